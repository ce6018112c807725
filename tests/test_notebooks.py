"""The notebooks run from top to bottom with the present code, and their stored outputs are up to date."""

import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# argv: a notebook, and the path to which the executed notebook is written.
EXECUTE = """
import os, sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
resources = {"metadata": {"path": os.path.dirname(sys.argv[1])}}
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
nbformat.write(notebook, sys.argv[2])
"""


def execute(folder, path):
    return [sys.executable, "-c", EXECUTE, str(path), str(folder / "executed.ipynb")]


def printed(cell):
    """The text that a code cell shows, without pictures and warnings."""
    texts = [output["text"] if output.output_type == "stream" and output["name"] == "stdout"
             else output.get("data", {}).get("text/plain", "")
             for output in cell.outputs]
    return "".join(text for text in texts if not re.match(r"<(Figure|Axes)", text)).strip()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.beside(command=execute)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_prints_what_is_stored_in_it(path, beside):
    """Stored outputs must equal new ones, except in cells tagged "varies" (times, hardware)."""
    assert beside.returncode == 0, beside.stderr
    executed = nbformat.read(beside.folder / "executed.ipynb", as_version=4)
    as_saved = nbformat.read(path, as_version=4)
    for before, after in zip(code_cells(as_saved), code_cells(executed), strict=True):
        if "varies" not in before.metadata.get("tags", []):
            advice = f"run {path.name} again and save it, this cell changed:\n{before.source}"
            assert printed(after) == printed(before), advice


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_one_short_idea_a_cell_and_imports_the_code_instead_of_copying_it(path):
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(file.read_text() for file in ROOT.glob("*.py"))
    real = set(re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE))
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) < 25, cell.source
        copied = real & set(re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE))
        assert not copied, f"{copied} exists in the repository: import it"
    assert any(printed(cell) for cell in code_cells(notebook)), "no stored outputs"
