"""Fifty steps of recipes/tiny.yaml with each architecture, on the demo's document: every loss must fall.

python benchmarks/architectures.py [--steps 50] [--out benchmarks/results]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import record

from infctx.config import ARCHITECTURES

TEXT = Path("data/tiny/topics.txt")


def losses(arch: str, steps: int) -> tuple[list[float], float]:
    """Nats per byte at each step, and the seconds of them all."""
    run = Path("runs") / f"architecture-{arch}"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "infctx", "fit", "-c", "recipes/tiny.yaml", "--name", run.name]
    options = [f"--model.init.arch={arch}", f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x["loss"] for x in lines], sum(x["seconds"] for x in lines[-1:])


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """All losses in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for arch, loss in curves.items():
        axis.plot(range(1, len(loss) + 1), loss, label=arch)
    axis.set(xlabel="optimizer step of 2,048 bytes", ylabel="loss, nats per byte")
    axis.legend(ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Train each, print a table, write JSON and a plot; fail if a loss did not fall."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    TEXT.parent.mkdir(parents=True, exist_ok=True)
    TEXT.write_text("\n\n".join(topics.values()), encoding="utf-8")
    curves, rows = {}, {}
    for arch in ARCHITECTURES:
        loss, seconds = losses(arch, options.steps)
        tenth = max(1, len(loss) // 10)
        first, last = (sum(part) / tenth for part in (loss[:tenth], loss[-tenth:]))
        curves[arch], rows[arch] = loss, {"first": first, "last": last, "seconds": seconds}
        print(f"{arch:10} {first:.3f} -> {last:.3f} nats per byte in {len(loss)} steps, {seconds:.0f} s")
        if last > 0.9 * first:
            sys.exit(f"{arch}: the loss did not fall")
    record.write(options.out / "architectures.json", steps=options.steps, rows=rows)
    plot(curves, options.out / "architectures.svg")


if __name__ == "__main__":
    main()
