"""Peak resident memory of one exact training step over one document, by its length.

    python benchmarks/memory.py [--lengths 16384 65536 262144 1048576] [--keep all every-16] [--out benchmarks/results]

A tiny RWKV-7 reads each document as one window of 512-token segments: window_loss, backward, AdamW step, in a process
of its own. What may grow with a segment is its border state and its part of the window: tokens and targets (8 bytes a
token each), ids (4) and starts (1). The bound is 1.05 times that. With `states.keep: every-16` it is a sixteenth of the
border state in place of all of it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import record

SEGMENT = 512
SIZES = {"n_layer": 2, "n_embd": 64, "vocab_size": 257, "head_size": 16}


def one_step(length: int, keep: str) -> dict[str, float]:
    """Train one step on a random document of `length` inputs; returns the process's peak, and the time of the step."""
    import torch

    import infctx
    from infctx.borders import StatesConfig
    from infctx.bptt import window_loss
    from infctx.optim import OptimizerConfig, make_optimizer
    from infctx.segments import Window

    torch.manual_seed(0)
    model = infctx.init_model(infctx.ModelConfig("rwkv7", **SIZES))
    optimizer = make_optimizer(model, OptimizerConfig())

    def step(tokens: int) -> None:
        shape = (1, tokens // SEGMENT, SEGMENT)
        ids, start = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
        start[0, 0, 0] = True
        window = Window(torch.randint(1, 257, shape), torch.randint(1, 257, shape), start, ids)
        loss, _, _ = window_loss(model, window, None, states=StatesConfig(keep))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(16):  # the heap of a process that has trained for a while has holes of some MB, whatever the length
        step(32 * SEGMENT)
    begin = time.perf_counter()
    step(length)
    seconds = time.perf_counter() - begin
    return {
        "tokens": length,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": seconds,
    }


def allowed(keep: str) -> float:
    """Bytes that a segment may add: its border state in float32, and its tokens, targets, ids and starts."""
    c, n = SIZES["n_embd"], SIZES["head_size"]
    state = SIZES["n_layer"] * (2 * c + c * n) * 4
    return state / (1 if keep == "all" else int(keep.removeprefix("every-"))) + SEGMENT * (8 + 8 + 4 + 1)


def plot(series: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Measured peaks, and the line that the first one and the bound give."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (keep, rows) in enumerate(series.items()):
        tokens, base = [row["tokens"] for row in rows], rows[0]["peak_bytes"]
        bound = [(base + 1.05 * allowed(keep) * (n - tokens[0]) / SEGMENT) / 1e6 for n in tokens]
        axis.plot(tokens, [row["peak_bytes"] / 1e6 for row in rows], "o-", color=f"C{i}", label=f"keep: {keep}")
        axis.plot(tokens, bound, "--", color=f"C{i}", label="1.05 x (kept border states + window)")
    axis.set(xlabel="tokens in the document", ylabel="peak resident memory, MB", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path)


def measure(lengths: list[int], keep: str) -> list[dict[str, float]]:
    """Every length in a process of its own."""
    rows: list[dict[str, float]] = []
    for length in lengths:
        command = [sys.executable, __file__, "--one", str(length), "--keep", keep]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        first, last, bound = rows[0], rows[-1], allowed(keep)
        segments = (length - first["tokens"]) // SEGMENT
        growth = (last["peak_bytes"] - first["peak_bytes"]) / segments if segments else 0.0
        last |= {"bytes_per_added_segment": growth, "ratio": growth / bound}
        print(f"{keep:>8} {length:>9,} tokens: peak {last['peak_bytes'] / 1e6:7.1f} MB, {last['seconds']:6.1f} s, "
              f"{growth:8,.0f} bytes an added segment = {growth / bound:.3f} x {bound:,.0f}")  # fmt: skip
    return rows


def main() -> None:
    """Measure every length, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 14, 1 << 16, 1 << 18, 1 << 20])
    parser.add_argument("--keep", nargs="+", default=["all", "every-16"], help="states.keep of a recipe")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_step(options.one, options.keep[0])))
        return
    series = {keep: measure(options.lengths, keep) for keep in options.keep}
    record.write(options.out / "memory.json", segment=SEGMENT, rows=series)
    plot(series, options.out / "memory.svg")


if __name__ == "__main__":
    main()
