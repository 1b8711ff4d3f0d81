"""Peak memory as `infctx plan` says it, beside what `infctx fit` takes, in processes of their own.

    python benchmarks/plan.py [--only ddp rwkv7] [--threads 1] [--out benchmarks/results]

With --out, what is in the file already is not measured again.

Each configuration is a whole `fit` of three optimizer steps on the CPU. Measured is the largest resident memory of the
first rank at the end of the last one, less that of the same `fit` with a model of one layer and 16 channels, which
has imported and loaded the same. The processes that are measured give every freed block of 64 kB and more back to the
system at once (MALLOC_MMAP_THRESHOLD_): planned are the bytes that are alive, not the holes that a heap keeps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
import yaml

HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
STEPS = 3  # in one epoch: DDP lays its buckets out anew in the second step, and touches them at its end
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """What is run: sizes, and keys of a recipe that are not the usual ones."""

    arch: str
    layers: int
    width: int
    length: int
    segments: int
    lanes: int = 1
    precision: str = "fp32"
    vocab: int = 4096
    horizon: int | None = None
    strategy: str = "single"
    ranks: int = 1
    accumulate: int = 1
    kernel: str = "auto"
    states: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A line's worth of it."""
        parts = [self.arch, f"L{self.layers}", f"C{self.width}", f"T{self.length}", f"S{self.segments}"]
        parts += [f"B{self.lanes}", self.precision, f"V{self.vocab}"]
        parts += [f"horizon {self.horizon}"] * (self.horizon is not None) + [self.kernel] * (self.kernel != "auto")
        parts += [f"{k} {v}" for k, v in self.states.items()] + [f"accumulate {self.accumulate}"] * (
            self.accumulate > 1
        )
        return " ".join([*parts, f"{self.strategy} x{self.ranks}"])


B = "bf16-mixed"
CASES = (
    Case("rwkv7", 6, 512, 512, 4), Case("rwkv7", 6, 512, 2048, 2), Case("rwkv7", 6, 512, 256, 4, 8),
    Case("rwkv7", 6, 512, 1024, 4, 1, B), Case("rwkv7", 6, 512, 512, 2, 4, B), Case("rwkv7", 12, 384, 1024, 3, 2),
    Case("rwkv7", 4, 768, 512, 3, 1, B, 16384), Case("rwkv7", 4, 512, 64, 64, 4),
    Case("rwkv7", 4, 512, 64, 64, 4, states={"keep": "every-8"}),
    Case("rwkv7", 4, 512, 64, 64, 4, states={"keep": "every-8", "offload": "cpu"}),
    Case("rwkv7", 6, 512, 512, 4, horizon=1), Case("rwkv7", 6, 512, 512, 4, accumulate=2),
    Case("rwkv7", 4, 512, 512, 3, kernel="chunked"), Case("rwkv7a", 4, 384, 1024, 3),
    Case("rwkv6", 6, 512, 512, 4), Case("rwkv6", 6, 512, 1024, 2, 2, B), Case("rwkv6", 4, 768, 1024, 2),
    Case("rwkv5", 6, 512, 1024, 3), Case("rwkv5", 6, 512, 512, 3, 2, B),
    Case("rwkv4", 6, 512, 1024, 3), Case("rwkv4", 6, 640, 512, 3, 4, B),
    Case("goldfinch", 6, 512, 512, 4), Case("goldfinch", 6, 512, 1024, 8), Case("goldfinch", 6, 384, 512, 6, 2, B),
    *(Case("rwkv7", 6, 512, 512, 4, strategy=x, ranks=2) for x in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
    *(Case("rwkv6", 6, 512, 1024, 2, 1, B, strategy=x, ranks=2) for x in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
)  # fmt: skip

HEAD = ["| configuration | planned, MB | measured, MB | ratio |", "|---" * 4 + "|"]


def planned(case: Case) -> tuple[int, dict[str, int]]:
    """Bytes at the peak of a rank, in all and by kind."""
    from infctx.borders import StatesConfig
    from infctx.config import ModelConfig
    from infctx.costs import Job, measure
    from infctx.engines import STRATEGIES, computed_in, peak, phases_on

    cut = STRATEGIES[case.strategy]
    config = ModelConfig(**model(case))
    job = Job(config, case.lanes, case.length, case.segments, case.horizon, StatesConfig(**case.states),
              computed_in(cut, case.precision), case.kernel)  # fmt: skip
    _, frame = peak(phases_on(cut, case.ranks, measure(job), job))
    return frame.total(), {k: v for k, v in frame.items() if v}


def model(case: Case) -> dict[str, object]:
    """The recipe's model.init."""
    sizes = {"n_layer": case.layers, "n_embd": case.width, "vocab_size": case.vocab}
    return {"arch": case.arch, "head_size": min(64, case.width), **sizes}


def measured(case: Case, folder: Path, threads: int) -> int:
    """Largest resident memory of the first rank, in bytes, after the steps of a whole `fit`."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    tokens = case.length * case.segments
    steps = STEPS if case.ranks > 1 else 2  # one rank has moments, and gradients of the step before, in the second
    for i in range(steps * case.lanes * case.ranks * case.accumulate):
        (texts / f"{i}.txt").write_text(("the state of a book " * (tokens // 20 + 1))[:tokens])
    recipe = {
        "model": {"init": model(case), "horizon": case.horizon, "kernel": case.kernel},
        "states": dict(case.states),
        "data": {"source": {"path": str(texts), "format": "text"}, "path": str(folder / "data"), "tokenizer": "bytes",
                 "segment_length": case.length, "segments_per_window": case.segments, "batch_size": case.lanes},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False,
                    "precision": {"fp32": "32-true"}.get(case.precision, case.precision), "devices": case.ranks,
                    "accumulate_grad_batches": case.accumulate,
                    "strategy": {"single": "auto"}.get(case.strategy, case.strategy)},
    }  # fmt: skip
    if case.strategy in ("single", "ddp"):
        overlay = []
    else:
        del recipe["trainer"]["strategy"]
        overlay = ["-c", str(ROOT / "recipes" / "strategy" / f"{case.strategy}.yaml")]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "infctx", "fit", "-c", "recipe.yaml", *overlay, "--name", "run"]
    environment = {**os.environ, **HEAP, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip()[-500:]}")
    return json.loads((folder / "runs/run/metrics.jsonl").read_text().splitlines()[-1])["peak_memory_bytes"]


def compare(case: Case, baselines: dict[tuple[object, ...], int], threads: int) -> dict[str, object]:
    """A case, planned and measured. Args: baselines: of what is imported alike, as far as they are known."""
    kind = (case.precision, case.strategy, case.ranks)
    with tempfile.TemporaryDirectory() as folder:
        if kind not in baselines:
            alike = {"precision": case.precision, "strategy": case.strategy, "ranks": case.ranks}
            small = Case("rwkv7", 1, 16, 16, 2, vocab=257, **alike)
            baselines[kind] = measured(small, Path(folder, "small"), threads)
        found = measured(case, Path(folder, "case"), threads) - baselines[kind]
    total, kinds = planned(case)
    return {"name": case.name, "planned": total, "measured": found, "ratio": total / found, "kinds": kinds}


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    return f"| {row['name']} | {row['planned'] / 1e6:.0f} | {row['measured'] / 1e6:.0f} | {row['ratio']:.3f} |"


def main() -> None:
    """Plan and measure each case, print a table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words of which the name holds one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch  # after the options: it takes a second

    torch.set_num_threads(options.threads)
    path = options.out / "plan.json" if options.out else None
    known = json.loads(path.read_text())["rows"] if path and path.exists() else []
    rows, baselines = {row["name"]: row for row in known}, dict[tuple[object, ...], int]()
    print("\n".join(HEAD), flush=True)
    for case in (x for x in CASES if any(word in x.name for word in options.only)):
        if case.name not in rows:
            rows[case.name] = compare(case, baselines, options.threads)
        print(line(rows[case.name]), flush=True)
        if path:
            ordered = [rows[x.name] for x in CASES if x.name in rows]
            record.write(path, threads=options.threads, rows=ordered)
            record.write_table(path.with_suffix(".md"), HEAD + [line(row) for row in ordered])
    worst = max(rows.values(), key=lambda row: abs(row["ratio"] - 1))
    print(f"\n{len(rows)} configurations, worst ratio {worst['ratio']:.3f}: {worst['name']}")


if __name__ == "__main__":
    main()
