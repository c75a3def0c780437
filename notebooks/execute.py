"""Make notebooks from their scripts, with outputs.

    python notebooks/execute.py                        # all of them
    python notebooks/execute.py 1_explore_a_teacher    # some

What would differ from run to run and means nothing is left out: times, names of cells, versions.
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def executed(script: Path, parameters: str | None = None) -> nbformat.NotebookNode:
    """Notebook of a script, executed; ``parameters`` is run after its cell of parameters."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    if parameters is not None:
        tagged = ["parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells]
        notebook.cells.insert(tagged.index(True) + 1, nbformat.v4.new_code_cell(parameters))
    # The kernel draws into the notebook, whatever backend is set here.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=1800, record_timing=False, resources=resources)
        client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """Take a picture, in base64, to 128 colours: a third of its size."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("[0-9]_*.py"))
    for name in names:
        path = HERE / f"{name}.ipynb"
        nbformat.write(executed(HERE / f"{name}.py"), path)
        print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")
