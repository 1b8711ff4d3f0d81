"""Kernels that are asked for the room they take and never run: for a plan of memory, on tensors without contents."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infctx.ops import fused_ops, native
from infctx.ops.backends import BACKENDS
from infctx.ops.cuda import Cuda
from infctx.ops.native import Call, Library

# Of the CUDA kernels, as their sources have it: tokens between saved states, vectors saved beside them.
KEEPS = {"wkv4": (8, 0), "wkv6": (16, 0), "wkv7": (16, 1), "wkv6_mma": (32, 0), "wkv7_mma": (32, 0)}
PARTIALS = {"wkv6": (3, 1), "wkv7": (5, 0)}  # vectors of a token and of a sequence that strips of a head sum up
ROWS = {"rwkv7_prepare": 5, "rwkv7_output": 3, "rwkv6_output": 2}  # rows of partial sums for a block of tokens
BLOCK, STRIPS, BUSY = 32, 4, 256


class CudaSizes:
    """Stands for the CUDA library where there is none."""

    def call(self, *_: Any) -> None:
        """Nothing."""

    def keeps(self, op: str, dtype: int, size: int) -> tuple[int, int]:
        """As `Library.keeps`."""
        return KEEPS[op]

    def workspace(self, op: str, call: Call) -> int:
        """As `Library.workspace`."""
        if op in PARTIALS:
            tokens, sequences = PARTIALS[op]
            idle = call.size == 128 or (call.size == 64 and call.sequences * call.heads < BUSY)
            numbers = (tokens * call.tokens + sequences * call.sequences) * call.heads * call.size
            return STRIPS * numbers * 4 if idle else 0
        if op == "shift_mix":  # its heads are mixes
            return -(-call.tokens // BLOCK) * call.heads * call.size * 4
        return -(-call.tokens // BLOCK) * ROWS.get(op, 0) * call.heads * call.size * 4


class Silent:
    """A library that answers for its sizes and does nothing."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.keeps, self.workspace = library.keeps, library.workspace

    def call(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def planned_kernels(device: str, multiprocessors: int) -> Iterator[None]:
    """Inside, the compiled kernels of the CPU are silent, or those of a GPU stand for them."""
    before = BACKENDS["cpu"]
    logger = logging.getLogger("infctx.ops")
    level, library = logger.level, _library()
    logger.setLevel(logging.WARNING)
    if device == "cuda":
        planned = Cuda("auto", build=Path, multiprocessors=lambda: multiprocessors)
        for kernel in planned.kernels.values():
            vars(kernel)["library"] = CudaSizes()
        BACKENDS["cpu"] = planned
        vars(native.CPU)["library"] = CudaSizes()
    elif library is not None:
        vars(native.CPU)["library"] = Silent(library)
    fused_ops._available.cache_clear()
    try:
        yield
    finally:
        logger.setLevel(level)
        BACKENDS["cpu"] = before
        vars(native.CPU).pop("library", None)
        if library is not None:
            vars(native.CPU)["library"] = library
        fused_ops._available.cache_clear()


def _library() -> Library | None:
    try:
        return native.CPU.library
    except RuntimeError:  # no compiler: the plan is of what runs then
        return None
