"""One rank of tests/test_layouts.py: python layout_ranks.py RANK RANKS FOLDER FIRST COUNT. Saves what came of them.

A layout is documents of uneven lengths, planned into windows as in training; its gradient is that of all windows.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny import VOCAB, tiny_model

from infctx.bptt import window_loss
from infctx.loader import WindowLoader
from infctx.parallel.scan import Scan
from infctx.parallel.wavefront import Wavefront
from infctx.segments import Plan

ARCHS = ["rwkv7", "rwkv6", "rwkv4", "rwkv5", "goldfinch", "rwkv7a"]


class Texts:
    """Documents in memory, some of whose targets are not learnt."""

    def __init__(self, random: np.random.Generator) -> None:
        longest = random.choice([3, 40, 150])
        lengths = random.integers(2, longest + 2, random.integers(3, 12))
        self.texts = [random.integers(VOCAB, size=n) for n in lengths]
        self.masks = [random.random(n) < 0.7 for n in lengths]
        self.inputs = lengths - 1
        self.supervised = np.array([int(mask[1:].sum()) for mask in self.masks])

    def tokens(self, document: int, begin: int, end: int) -> np.ndarray:
        return self.texts[document][begin:end]

    def mask(self, document: int, begin: int, end: int) -> np.ndarray:
        return self.masks[document][begin:end]


def gradient(layout: int, way: str, runners: dict, rank: int, ranks: int) -> torch.Tensor:
    """The summed gradient of an epoch, on all ranks. way: alone, lanes (each rank has its own), or a runner's name."""
    random = np.random.default_rng(layout)
    documents, lanes = Texts(random), ranks * int(random.integers(1, 3))
    length, segments, horizon = int(random.integers(1, 25)), random.choice([0, 1, 3, 7]), random.choice([0, 1, 2])
    plan = Plan(documents.inputs, lanes, length, int(segments) or None, layout, 0)
    share = lanes // ranks
    own = range(rank * share, (rank + 1) * share) if way == "lanes" else range(lanes)
    loader = WindowLoader(documents, lambda _: plan, own, int(random.integers(1, 4)), 0, {})
    model, state = tiny_model(ARCHS[layout % len(ARCHS)]), None
    for window in loader:
        loss, _, state = window_loss(
            model, window, state, int(horizon) or None, window.normaliser, runner=runners.get(way)
        )
        loss.backward()
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    if way != "alone" and ranks > 1:
        dist.all_reduce(found)
    return found


def main() -> None:
    rank, ranks, folder, first, count = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:])
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # of any one message: a layout that hangs ends both ranks
    dist.init_process_group("gloo", f"file://{folder}/ranks", limit, ranks, rank)
    runners = {"wavefront": Wavefront(timeout=limit), "scan": Scan()}
    rows = []
    for layout in range(first, first + count):
        ways = ["lanes", "wavefront"] + ["scan"] * (ARCHS[layout % len(ARCHS)] != "goldfinch")
        expected = gradient(layout, "alone", {}, 0, ranks) if layout % ranks == rank else None
        for way in ways:
            begin = time.perf_counter()
            found = gradient(layout, way, runners, rank, ranks)
            seconds = time.perf_counter() - begin
            if expected is not None:
                rows.append((layout, way, float((found - expected).norm() / expected.norm()), seconds))
    torch.save(rows, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
