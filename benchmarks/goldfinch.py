"""Peak memory of an exact training step of GoldFinch, by how much of the document lies behind it.

    python benchmarks/goldfinch.py [--lengths 16384 65536 262144] [--out benchmarks/results]

A window of two segments of 512 tokens, loss and backward, goes on from a memory of that many tokens, in a process of
its own. Beside it: the compressed size (a key of C/16 numbers and a token id), and what the keys and values of the
attention layers would take if they were kept.
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
SIZES = {"n_layer": 3, "n_embd": 256, "vocab_size": 257, "head_size": 64}


def one_step(length: int) -> dict[str, float]:
    """Bytes by which the process grew, and the seconds of the step."""
    import torch

    import infctx
    from infctx.bptt import window_loss
    from infctx.segments import Window
    from infctx.state import KeyMemory

    torch.manual_seed(0)
    model = infctx.init_model(infctx.ModelConfig("goldfinch", **SIZES))
    with torch.no_grad():
        for p in model.parameters():  # zeros at the beginning would let gradients be zero
            p += 0.02 * torch.randn_like(p)

    def step(past: int) -> None:
        keys = torch.randn(past, model.config.ranks["compress"])
        memory = KeyMemory(torch.randint(257, (past,)).int(), keys, torch.tensor([0, past]).int())
        shape = (1, 2, SEGMENT)
        ids, start = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
        window = Window(torch.randint(1, 257, shape), torch.randint(1, 257, shape), start, ids)
        loss, _, _ = window_loss(model, window, model.initial_state(1)._replace(memory=memory))
        loss.backward()

    for _ in range(4):
        step(2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    step(length)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"tokens": length, "bytes": grown, "seconds": time.perf_counter() - begin}


def main() -> None:
    """Measure every length, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 14, 1 << 16, 1 << 18])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_step(options.one)))
        return
    compressed, expanded = SIZES["n_embd"] // 16 * 4 + 4, 2 * SIZES["n_embd"] * 4
    rows = []
    for length in options.lengths:
        command = [sys.executable, __file__, "--one", str(length)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({**row, "bytes_a_token": row["bytes"] / length})
        print(f"{length:>8,} tokens behind: {row['bytes'] / 1e6:6.1f} MB more, {row['bytes'] / length:5.0f} bytes "
              f"a token, {row['seconds']:.1f} s")  # fmt: skip
    print(f"bytes a token: {compressed} compressed; {expanded} for the keys and values of one layer")
    record.write(options.out / "goldfinch.json", compressed=compressed, expanded=expanded, rows=rows)


if __name__ == "__main__":
    main()
