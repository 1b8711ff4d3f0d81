"""Each mistake of bad_inputs.yaml is told in a few lines that name the place and the mend, and leaves no result."""

import shutil
from pathlib import Path

import pytest
import torch
from bad_inputs import FILES, Case, cases, inside, make_bad_project, quietly, row

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "messages.md"
CASES = cases()
RESULTS = ("*.pth", "*.safetensors", "metrics.jsonl", "report.html", "manifest.json", "adapter_config.json", "exploded")


@pytest.fixture(scope="module")
def bad_project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "project"
    make_bad_project(folder)
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.wrong)
def test_message(bad_project, case: Case):
    before = tree(bad_project)
    with inside(bad_project):
        code, said = quietly(case.command)
    made = {Path(name) for name in tree(bad_project) - before}
    for folder in {x.parts[0] for x in made} & {"new", "less"} | {"runs/new"}:
        shutil.rmtree(bad_project / folder, ignore_errors=True)
    assert code == 2, said
    assert said.startswith("infctx: error: ") and 1 <= len(said.splitlines()) <= 5 and "Traceback" not in said
    assert max(map(len, said.splitlines())) <= 400, said
    assert not [word for word in case.words if word not in said], said
    assert not [name for name in made if any(name.match(x) for x in RESULTS)]
    if case.command.startswith("prepare"):
        assert not [name for name in made if name.suffix in (".arrow", ".json", ".part")]
    table = TABLE.read_text(encoding="utf-8")
    if f"torch {torch.__version__}" in table.splitlines()[0]:  # libraries' words are theirs to change
        assert row(case, said) in table, "run benchmarks/messages.py"


def test_table_has_no_other_rows():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) == len(CASES) == len({case.wrong for case in CASES}) >= 60
    assert [line.split(" | ")[0][2:] for line in rows] == [case.wrong for case in CASES]


def test_files_are_all_used():
    commands = " ".join(case.command for case in CASES)
    assert [x for x in FILES if x.split(".")[0] not in commands and x != "base-of-other.pth"] == []
