"""Notebooks are committed with outputs; here they run at a small size, their code is compared."""

import importlib.util
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from processes import Forked

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {
    "1_explore_a_teacher": "n_images, teacher_epochs, student_epochs = 100, 1, 1",
    "2_distil_from_a_ranking": "n_images, epochs, failing_step = 160, 2, 5",
    "3_read_the_geometry": "n_images, epochs, half_samples, null = 100, 1, 2, 0",
    "4_a_text_encoder": "train_texts, test_texts, most_tokens, epochs, seeds = 8, 2, 10, 1, 1",
    "5_signals": "teacher_epochs, epochs, seeds, utterances = 1, 1, 1, 3",
    "6_what_helps_a_student": "teachers = 2",
}
BRIEF = """
%matplotlib inline
import warnings
warnings.filterwarnings("ignore", message=".*has learned nothing|a class has fewer than 25 samples")
"""
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs_of(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def code_of(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == list(SMALL)


def forked_kernel(command, *, env, cwd, **_):
    """A real kernel, forked where torch is loaded already."""
    module = command.index("-m") + 1
    return Forked(command[module], command[module + 1 :], environment=env, folder=cwd)


@pytest.mark.slow
@named
def test_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setattr(local_provisioner, "launch_kernel", forked_kernel)
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    parameters = f"{BRIEF}{SMALL[path.stem]}"  # pyplot is loaded
    outputs = outputs_of(execute.executed(path.with_suffix(".py"), parameters))
    assert not [out for out in outputs if out.get("name") == "stderr"]
    assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
def test_a_bar_is_one_line_and_no_warning(monkeypatch):
    """Where there are no ipywidgets, of which tqdm warns."""
    monkeypatch.setattr(local_provisioner, "launch_kernel", forked_kernel)
    code = "import warnings; warnings.simplefilter('error')\n"
    code += "from geomkd.common.progress import bar_of\n"
    code += "with bar_of(9, 'work', show=True, leave=True) as bar:\n    bar.update(9)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}).execute()
    text = "".join(out["text"] for out in outputs_of(notebook) if out.get("name") == "stderr")
    assert text.startswith("\rwork:   0%") and text.count("\n") == 1 and "work: 100%" in text


@named
def test_its_code_is_that_of_its_script(path):
    notebook = nbformat.read(path, as_version=4)
    assert code_of(notebook) == code_of(jupytext.read(path.with_suffix(".py")))
    assert not re.search(r"^ *assert ", path.with_suffix(".py").read_text(), re.MULTILINE)


@named
def test_it_can_be_read_on_a_code_host(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in out.get("data", {}) for out in outputs_of(notebook))
    assert path.stat().st_size <= 300_000
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r'"stderr"|/tmp|/root|/home|/Users|site-packages|"execution":', text)
