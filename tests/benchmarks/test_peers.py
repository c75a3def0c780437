import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import environments
from benchmarks.peers.environments import INSTALLED, PEERS, environment, python_of
from benchmarks.peers.run import MEASURES, run_peer

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "benchmarks" / "peers" / f"peer_{name}.py" for name in PEERS]


def test_half_made_environment_is_made_anew_and_a_whole_one_kept(tmp_path):
    nothing = tmp_path / "requirements.txt"
    nothing.write_text("# an environment of Python alone\n")
    folder = environments.folder_of("skdim", tmp_path / "cache", nothing)
    (folder / "bin").mkdir(parents=True)  # all that a killed install left
    (folder / "bin" / "half").touch()
    assert environment("skdim", tmp_path / "cache", requirements=nothing) == folder
    assert (folder / INSTALLED).is_file() and not (folder / "bin" / "half").exists()
    code = "import importlib.util as u, sys; print(sys.prefix, u.find_spec('torch'))"
    said = subprocess.run([python_of(folder), "-I", "-c", code], capture_output=True, text=True)
    assert said.stdout.split() == [str(folder), "None"]  # ours is not seen
    (folder / "kept").touch()
    assert environment("skdim", tmp_path / "cache", requirements=nothing) == folder
    assert (folder / "kept").exists()


def test_failed_install_is_told_and_not_taken_for_whole(tmp_path):
    missing = tmp_path / "requirements.txt"
    missing.write_text("--no-index\nno-such-package==1.0\n")
    with pytest.raises(RuntimeError, match="no-such-package"):
        environment("dadapy", tmp_path / "cache", requirements=missing)
    assert not list((tmp_path / "cache").glob(f"*/{INSTALLED}"))


def test_another_pin_makes_another_environment(tmp_path):
    path = tmp_path / "requirements.txt"
    folders = []
    for content in ("a==1\n", "a==2\n", "a==1\n"):
        path.write_text(content)
        folders.append(environments.folder_of("skdim", tmp_path, path))
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "ripser"}, ValueError, "skdim, dadapy, pytorch_cka; got 'ripser'"),
        ({"name": "dadapy", "measure": "mle_dimension"}, ValueError, "dadapy has two_nn"),
        ({"paths": []}, ValueError, r"list of 1 path\(s\)"),
        ({"paths": "a.npy"}, ValueError, r"list of 1 path\(s\); got 'a.npy'"),
        ({"name": "pytorch_cka", "measure": "cka"}, ValueError, r"list of 2 path\(s\)"),
        ({"paths": ["nowhere.npy"]}, FileNotFoundError, "nowhere.npy"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
    ],
)
def test_refusals_come_before_an_environment_is_made(tmp_path, change, error, message):
    np.save(tmp_path / "a.npy", np.eye(3))
    call = {"name": "skdim", "measure": "two_nn", "paths": [tmp_path / "a.npy"]}
    call |= {"repeats": 1, "threads": 1, "cache": tmp_path / "cache"} | change
    with pytest.raises(error, match=message):
        run_peer(**call)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=PEERS)
def test_scripts_stand_alone_and_offer_the_measures_of_the_table(path):
    tree = ast.parse(path.read_text())
    imported = {
        (name.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    own = {"skdim": {"skdim"}, "dadapy": {"dadapy"}, "pytorch_cka": {"cka", "torch"}}
    name = path.stem.removeprefix("peer_")
    assert imported - sys.stdlib_module_names == own[name] | {"numpy"}
    (measures,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "MEASURES"
    )
    assert measures == MEASURES[name]


def test_no_extra_of_ours_holds_a_peer():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        ours += extra
    peers = ("scikit-dimension", "dadapy", "pytorch-cka")
    pinned = "\n".join(environments.requirements_of(name).read_text() for name in PEERS).replace(
        "_", "-"
    )
    for peer in peers:
        assert f"{peer}==" in pinned
        assert not any(requirement.startswith(peer) for requirement in ours)
