"""Compiled kernels behind the backends' interface: shapes, buffers and pointers; `cuda/wkv.h` is the other side."""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infctx.ops.build import build_cpu

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WIDE = {"wkv4": (0, 1), "wkv6": (3, 4), "wkv7": (1,)}  # inputs in the state's dtype: log decays and constants
CONSTANTS = {"wkv4": (0, 1), "wkv6": (4,), "wkv7": ()}  # inputs that all tokens share
VALUE = {"wkv4": 3, "wkv6": 2, "wkv7": 3}  # where v is
SIZES = (16, 32, 64, 128)  # of heads that there are compiled kernels for


class Call(ctypes.Structure):
    """`Call` of wkv.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "heads", "size")),
        ("borders", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )  # fmt: skip


class Keeps(ctypes.Structure):
    """`Keeps` of wkv.h."""

    _fields_ = (("every", ctypes.c_int64), ("vectors", ctypes.c_int64))


class Library:
    """The functions of one shared library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, function: str, call: Call, arrays: Sequence[Tensor | None]) -> None:
        """Run a function on dense tensors. Raises: RuntimeError if it was not built for these, or CUDA refuses."""
        pointers = (ctypes.c_void_p * len(arrays))(*(None if x is None else x.data_ptr() for x in arrays))
        first = arrays[0]
        with torch.cuda.device(first.device) if first is not None and first.is_cuda else nullcontext():
            code = getattr(self.library, function)(ctypes.byref(call), pointers)
        if code:
            why = f"CUDA error {code}" if code > 0 else f"no kernel for head size {call.size} in this dtype"
            raise RuntimeError(f"{function}: {why}")

    def keeps(self, op: str, dtype: int, size: int) -> tuple[int, int]:
        """Tokens between saved states, and vectors of each token saved beside them."""
        function = getattr(self.library, f"{op}_keeps")
        function.restype, function.argtypes = Keeps, (ctypes.c_int32, ctypes.c_int64)
        kept = function(dtype, size)
        return kept.every, kept.vectors

    def workspace(self, op: str, call: Call) -> int:
        """Bytes that the backward of this call needs."""
        function = getattr(self.library, f"{op}_workspace")
        function.restype = ctypes.c_int64
        return int(function(ctypes.byref(call)))


class Native:
    """A backend out of a library that is built and loaded on first use."""

    def __init__(self, build: Callable[[], Path], suffix: str = "", low_precision: bool = False) -> None:
        """Args: suffix: of the functions' names. low_precision: whether they take 16-bit inputs as they are."""
        self.build, self.suffix, self.low_precision = build, suffix, low_precision

    @cached_property
    def library(self) -> Library:
        """Raises: RuntimeError where it can not be built."""
        return Library(self.build())

    def saved(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> Any:
        """As `Backend.saved`; an int, or a symbol while torch traces."""
        shape = inputs[VALUE[op]].shape
        rows, width = shape[0] * shape[1], shape[2:].numel()
        every, vectors = self.library.keeps(op + self.suffix, DTYPES[self.dtype(op, inputs, state)], int(shape[-1]))
        states = (rows // every + state.shape[0]) * state.shape[1:].numel() if every else 0
        return states + vectors * rows * width

    def forward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        """As `Backend.forward`. Raises: RuntimeError for a head size without a kernel."""
        dense, call = self.prepare(op, inputs, state, borders)
        y, last = torch.empty_like(dense[VALUE[op]]), torch.empty_like(state, memory_format=torch.contiguous_format)
        saved = state.new_empty(self.saved(op, inputs, state) if keep else 0)
        arrays = [*dense, state.contiguous(), y, last, saved if keep else None]
        self.library.call(f"{op}{self.suffix}_forward", call, arrays)
        return y, last, saved

    def backward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, saved: Tensor, dy: Tensor, dstate: Tensor,
        borders: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As `Backend.backward`."""
        dense, call = self.prepare(op, inputs, state, borders)
        if not saved.numel():
            saved = self.forward(op, inputs, state, borders, keep=True)[-1]
        shared = CONSTANTS[op]
        grads = [x.new_empty(len(state), *x.shape) if i in shared else torch.empty_like(x) for i, x in enumerate(dense)]
        first = torch.empty_like(state, memory_format=torch.contiguous_format)
        space = torch.empty(self.library.workspace(op + self.suffix, call), dtype=torch.uint8, device=state.device)
        given = [state.contiguous(), saved, dy.to(dense[VALUE[op]].dtype).contiguous(), dstate.contiguous()]
        self.library.call(f"{op}{self.suffix}_backward", call, [*dense, *given, *grads, first, space])
        return *(g.sum(0) if i in shared else g for i, g in enumerate(grads)), first

    def dtype(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> torch.dtype:
        """Of the call: the dtype of v if the kernel takes it, which the other inputs are given in; else the state's."""
        return inputs[VALUE[op]].dtype if self.low_precision else state.dtype

    def prepare(self, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor) -> tuple[list[Tensor], Call]:
        """The inputs as the kernel takes them, and the call."""
        dtype = self.dtype(op, inputs, state)
        dense = [x.to(state.dtype if i in WIDE[op] else dtype).contiguous() for i, x in enumerate(inputs)]
        v = dense[VALUE[op]]
        heads, size = (1, v.shape[2]) if v.dim() == 3 else v.shape[2:]
        return dense, make_call(v, borders, v.shape[0] * v.shape[1], heads, size, dtype)


def make_call(like: Tensor, borders: Tensor | None, tokens: int, heads: int, size: int, dtype: torch.dtype) -> Call:
    """A call on the device of `like`, on its current stream. Args: borders: (S + 1,) int64, None without sequences."""
    sequences, at = (0, None) if borders is None else (len(borders) - 1, borders.data_ptr())
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else None
    return Call(sequences, tokens, heads, size, at, DTYPES[dtype], torch.get_num_threads(), stream)


CPU = Native(build_cpu)
