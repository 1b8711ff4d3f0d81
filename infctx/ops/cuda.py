"""The CUDA backend: which kernel a call runs on.

- recurrent: float32 throughout, token after token, any decay; for float32 inputs.
- tensor: chunks of tokens on tensor cores, the carried state in float32; for 16-bit inputs.
- pieces: either of them with long sequences cut, where there are too few to keep the device busy.
"""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infctx.ops import pieces
from infctx.ops.build import build_cuda
from infctx.ops.native import SIZES, VALUE, Native

log = logging.getLogger(__name__)
FORMS = ("auto", "recurrent", "tensor", "pieces")
TENSOR = ("wkv6", "wkv7")  # ops with a tensor-core kernel
ROWS = 16  # value rows of a state in a block of the recurrent kernels


def build() -> Path:
    """The library for the current device. Raises: RuntimeError as `build_cuda`."""
    return _built(torch.cuda.get_device_capability())


@cache
def _built(capability: tuple[int, int]) -> Path:
    return build_cuda(capability)  # which reads all sources: once, though every form and dtype asks


RECURRENT = Native(build, "", True)


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


class Cuda:
    """A backend of several kernels. Args: form: one of FORMS; the others are for tests without a GPU."""

    def __init__(
        self, form: str, build: Callable[[], Path] = build, multiprocessors: Callable[[], int] = _multiprocessors
    ) -> None:
        self.form, self.multiprocessors = form, multiprocessors
        self.kernels = {"recurrent": Native(build, "", True), "tensor": Native(build, "_mma", True)}

    def saved(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> Any:
        """As `Backend.saved`."""
        kernel, length = self._choose(op, inputs, state)
        return pieces.saved(kernel, op, inputs, state, length) if length else kernel.saved(op, inputs, state)

    def forward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        """As `Backend.forward`. Raises: ValueError for float64, or inputs that a forced kernel does not take."""
        kernel, length = self._choose(op, inputs, state)
        if length:
            return pieces.forward(kernel, op, inputs, state, borders, keep, length)
        return kernel.forward(op, inputs, state, borders, keep)

    def backward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, saved: Tensor, dy: Tensor, dstate: Tensor,
        borders: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As `Backend.backward`."""
        kernel, length = self._choose(op, inputs, state)
        if length:
            return pieces.backward(kernel, op, inputs, state, saved, dy, dstate, borders, length)
        return kernel.backward(op, inputs, state, saved, dy, dstate, borders)

    def _choose(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Native, int | None]:
        """The kernel, and the tokens of a piece if sequences are cut; by shapes and dtypes alone."""
        if state.dtype == torch.float64:
            raise ValueError("the CUDA kernels compute in float32: choose kernel reference or chunked for float64")
        shape, dtype = inputs[VALUE[op]].shape, self.kernels["tensor"].dtype(op, inputs, state)
        size, tokens, sequences = int(shape[-1]), int(shape[0] * shape[1]), max(1, int(state.shape[0]))
        fits = dtype != torch.float32 and op in TENSOR and size in SIZES
        if self.form == "tensor" and not fits:
            raise ValueError(f"no tensor-core kernel of {op} for head size {size} in {dtype}: choose kernel cuda")
        name = "tensor" if fits and self.form != "recurrent" else "recurrent"
        width = 1 if op == "wkv4" else int(shape[2])
        blocks = sequences * (-(-size // 128) if op == "wkv4" else width * max(1, size // ROWS))
        length = None
        if self.form == "pieces":
            length = pieces.UNIT * max(1, tokens // (8 * pieces.UNIT))
        elif self.form == "auto":
            length = pieces.piece_length(tokens // sequences, blocks, self.multiprocessors())
        _announce(op, name, str(dtype).removeprefix("torch."), size, length is not None)
        return self.kernels[name], length


@cache
def _announce(op: str, name: str, dtype: str, size: int, cut: bool) -> None:
    form = ", long sequences in pieces" if cut else ""
    log.info("%s on CUDA, %s, head size %d: %s kernel%s", op, dtype, size, name, form)
