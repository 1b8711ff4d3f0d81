"""What is said of each mistake in tests/bad_inputs.yaml, as a table.

python benchmarks/messages.py [--out benchmarks/results]
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import record
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def table() -> list[str]:
    """The lines of it. Raises: AssertionError for a command that does not fail."""
    from bad_inputs import cases, inside, make_bad_project, quietly, row

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder).resolve() / "project"
        make_bad_project(project)
        with inside(project):
            for kind, group in itertools.groupby(cases(), lambda case: case.kind):
                lines += ["", f"## {kind.capitalize()}", "", "| what is wrong | command | message |", "|---|---|---|"]
                for case in group:
                    code, said = quietly(case.command)
                    assert code == 2, (case, said)
                    lines.append(row(case, said))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    torch.set_num_threads(1)
    record.write_table(parser.parse_args().out / "messages.md", table(), "Each ends with exit code 2.")
