"""Weights after five steps of each strategy on two ranks, beside those of one rank that has both lanes.

    python benchmarks/strategies.py [--out benchmarks/results]

Two processes on this machine (gloo), float32, whole documents, accumulation 2 with a short last group, clipping; a tiny
model whose every parameter matters, started from a file. The figure is the largest relative difference of a tensor.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

STRATEGIES = ("ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "fsdp2")
CASES = {
    f"{arch} {name}": ["--model.load", f"{arch}.pth", *options]
    for arch, (name, options) in itertools.product(
        ("rwkv6", "rwkv7"), {"exact": [], "horizon 1": ["--model.horizon", "1"]}.items()
    )
}


def measure() -> dict[str, dict[str, float]]:
    """Strategy -> case -> difference. Raises: AssertionError with what a rank said, if one fails."""
    import test_strategies as tests
    from tiny import worst

    data = ["--data.segments_per_window", "document", "--trainer.accumulate_grad_batches", "2",
            "--trainer.gradient_clip_val", "0.05", *tests.STEPS]  # fmt: skip
    runs = {case.replace(" ", "-"): [*options, *data] for case, options in CASES.items()}
    with tempfile.TemporaryDirectory() as folder:
        project = tests.project_at(Path(folder) / "project")
        tests.fit(project, 1, {f"one-{case}": options for case, options in runs.items()}, 900)
        cut = {
            f"{name}-{case}": [*tests.strategy(name), *options]
            for name, (case, options) in itertools.product(STRATEGIES, runs.items())
        }
        tests.fit(project, 2, cut, 1800)
        table: dict[str, dict[str, float]] = {name: {} for name in STRATEGIES}
        for name, case in itertools.product(STRATEGIES, CASES):
            ours, theirs = (tests.checkpoint(project, f"{x}-{case.replace(' ', '-')}", 5)[0] for x in (name, "one"))
            table[name][case] = worst([ours[k] for k in theirs], list(theirs.values()))
    return table


def main() -> None:
    """Print the table as Markdown, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    table = measure()
    lines = ["| strategy | " + " | ".join(CASES) + " |", "|---" * (len(CASES) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[case]:.1e}" for case in CASES) + " |" for name, row in table.items()]
    print("\n".join(lines))
    record.write(options.out / "strategies.json", ranks=2, steps=5, worst=table)
    record.write_table(options.out / "strategies.md", lines)


if __name__ == "__main__":
    main()
