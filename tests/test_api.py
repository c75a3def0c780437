"""The package as a whole: its names, what an import costs, and rules that every file keeps."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import geomkd
import geomkd.distillation
import geomkd.measures

ROOT = Path(geomkd.__file__).parent

# Folders of the package, as data flows: a file imports, at module level, only from folders before
# its own, and from files of its own folder. Single files stand at their place among them.
ORDER = [
    "common",
    "network",
    "data",
    "datasets",
    "geometry",
    "measures",
    "plots",
    "scoring",
    "distillation",
    "report",
    "quickstart",
    "",  # geomkd itself
    "cli",
    "__main__",
]
HEAVY = ("matplotlib", "pandas", "sklearn", "scipy.stats", "torchvision", "torch._dynamo")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


TREES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
files = pytest.mark.parametrize("name", TREES)


def at_module_level(node):
    """Statements that run at import, those below if and try included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_module_level(child)


def imported(node):
    """Files of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, "imports are absolute"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        modules = [n for n in inside if n.removeprefix("geomkd.") in TREES]
        names = modules or [node.module]
    return [
        n.removeprefix("geomkd").removeprefix(".") for n in names if n.split(".")[0] == "geomkd"
    ]


def called(node, *path):
    """Whether a node is a call of a name, or of an attribute of a name."""
    if not isinstance(node, ast.Call):
        return False
    if len(path) == 1:
        return isinstance(node.func, ast.Name) and node.func.id == path[0]
    return isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == ".".join(path)


def docstrings(tree):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None
    }


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [geomkd, geomkd.measures, geomkd.distillation])
def test_all_resolves(module):
    assert module.__all__ == sorted(module.__all__) and len(module.__all__) > 1
    assert all(hasattr(module, name) for name in module.__all__)


def test_what_is_promised_is_there():
    assert set(geomkd.__all__) >= {
        "LayerScores",
        "candidate_layers",
        "capture",
        "choose_layers",
        "distill",
        "efficiency",
        "information",
        "knowledge_quality",
        "pair_layers",
        "score_layers",
        "separation",
    }


@pytest.mark.parametrize("name", geomkd.__all__)
def test_public_names_are_documented(name):
    value = getattr(geomkd, name)
    text = inspect.getdoc(value)
    assert text
    if not inspect.isfunction(value):
        return
    assert "Parameters\n---" in text or "as in `knowledge_quality`" in text
    assert "Returns\n---" in text or "Yields\n---" in text
    assert "Examples\n---" in text and ">>> " in text
    if "Parameters\n---" in text:
        described = text.split("Parameters\n---")[1]
        assert all(option in described for option in inspect.signature(value).parameters)


@pytest.mark.parametrize("name", geomkd.__all__)
def test_functions_take_few_arguments_by_position(name):
    value = getattr(geomkd, name)
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters.values()
        assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) <= 3


def test_import_is_light_and_plain_models_do_not_load_the_compiler():
    code = f"""
import sys, geomkd, torch
loaded = [m for m in {HEAVY} if m in sys.modules]
assert not loaded, loaded
from geomkd.network.hooks import features_of
features_of(torch.nn.Sequential(torch.nn.ReLU()), torch.zeros(1, 2), ["0"])
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- rules of the files --------------------------------------------------------------------------


def station(name):
    """The folder of a file, or the file itself where it stands alone."""
    return name.partition(".")[0]


def test_order_names_every_folder():
    assert set(ORDER) == set(map(station, TREES))


def test_few_files_stand_alone():
    assert len(list(ROOT.glob("*.py"))) <= 8


@files
def test_imports_come_from_folders_before(name):
    own = station(name)
    for node in at_module_level(TREES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for other in map(station, imported(node)):
                before = ORDER[: ORDER.index(own)]
                assert other == own or other in before, f"{name}, line {node.lineno}"


@files
def test_no_device_is_named(name):
    tree = TREES[name]
    texts = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            text = node.value.lower()
            assert not text.startswith("cuda") and text != "cpu", f"{name}, line {node.lineno}"


@files
def test_files_are_loaded_as_weights_only(name):
    for node in ast.walk(TREES[name]):
        if called(node, "torch", "load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"{name}, line {node.lineno}"


@files
def test_only_the_command_line_prints(name):
    if name != "cli.main":
        for node in ast.walk(TREES[name]):
            assert not called(node, "print"), f"{name}, line {node.lineno}"


def test_rules_see_what_breaks_them():
    tree = ast.parse(
        "import torch\n"
        "if torch:\n    from geomkd.cli.main import main\n    from geomkd import scoring\n"
        "def f():\n    import geomkd.plots\n    print(torch.load('cuda:0'))\n"
    )
    found = [i for i in at_module_level(tree) if isinstance(i, ast.Import | ast.ImportFrom)]
    assert [imported(node) for node in found] == [[], ["cli.main"], ["scoring"]]
    nodes = list(ast.walk(tree))
    assert sum(called(node, "print") for node in nodes) == 1
    assert sum(called(node, "torch", "load") for node in nodes) == 1
