"""Law 12: every notebook runs, tiny, and is committed without what a run leaves in it."""

import re
from pathlib import Path

import nbformat
import papermill
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What makes each of them a matter of seconds; all that it asserts holds here too.
SMALL = {
    "1-the-state-is-memory": {"arch": "rwkv6", "segment_length": 16, "segments": 8},
    "2-what-truncation-costs": {"horizons": ["null", 1]},
    "3-your-own-long-text": {"characters": 15_000},
    "4-state-tuning": {"base_documents": 2400, "style_documents": 480},
    "5-a-sweep-of-recipes": {
        "variants": {f"rate {rate}": {"model.optimizer.lr": rate} for rate in (2e-3, 6e-3)},
        "characters": 8_000,
    },
}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, folder, monkeypatch, **parameters):
    """Run it in a folder of its own, one thread a process: tests run side by side."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    done = papermill.execute_notebook(
        notebook, folder / "done.ipynb", parameters, cwd=folder, progress_bar=False, start_timeout=300
    )
    return [output for cell in code(done) for output in cell.outputs]


def test_notebooks_were_found():
    assert {x.stem for x in NOTEBOOKS} == set(SMALL) and len(SMALL) == 5


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda x: x.stem)
def test_committed_as_written(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.kernelspec.name == "python3"
    assert [i for i, cell in enumerate(cells) if cell.metadata.get("tags") == ["parameters"]] == [0]
    assert re.search(r"^assert ", cells[-1].source, re.M) and "display(" in cells[-1].source
    assert notebook.cells[0].cell_type == "markdown" and "live.run(" in "".join(cell.source for cell in cells)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda x: x.stem)
def test_notebook_runs(file, tmp_path, monkeypatch):
    outputs = execute(file, tmp_path, monkeypatch, **SMALL[file.stem])
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds  # a plot and a table
    assert {x.name for x in tmp_path.iterdir()} <= {"work", "done.ipynb", "ipython"}


@pytest.mark.slow
def test_a_command_that_fails_stops_the_notebook(tmp_path, monkeypatch):
    """With the command's own words; nothing after it is run."""
    variants = {"wrong": {"model.optimizer.lr": -1}}
    with pytest.raises(papermill.PapermillExecutionError) as error:
        execute(FOLDER / "5-a-sweep-of-recipes.ipynb", tmp_path, monkeypatch, variants=variants, characters=500)
    assert "CommandError: infctx fit: exit code 2" in re.sub(r"\x1b\[[\d;]*m", "", str(error.value))
    assert "model.optimizer.lr must be above 0, got -1" in str(error.value)
    stopped = code(nbformat.read(tmp_path / "done.ipynb", as_version=4))
    assert stopped[-1].execution_count is None
