"""The compiled forms of `fused` as ops of torch with their gradients; `cuda/fused.h` is the other side.

An op takes its tensors, borders (S + 1,) int64 or None, H heads (in shift_mix: mixes) of N, and the dtype of its
results. Its backward takes the same and the gradients, but that of relu_squared has the result instead of the input:
the product that follows keeps it anyway, and twice its root is the slope.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from infctx.ops import cuda, native
from infctx.ops.backends import constant
from infctx.ops.native import DTYPES, SIZES, Library, make_call

Tensors = Sequence[Tensor | None]
Specs = list[tuple[Sequence[int], torch.dtype] | None]  # shapes and dtypes of results, None for one that is not there
NAMESPACE = torch.library.Library("infctx", "FRAGMENT")
SCHEMA = "Tensor?[] inputs, Tensor? borders, int heads, int size, ScalarType dtype"
TAKEN = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def compiled(form: str, x: Tensor, size: int, headed: bool = True) -> bool:
    """Whether to take the compiled form. Args: size: of a head, or of all channels if it is not of heads.

    Raises: ValueError for a form that is none.
    """
    if form not in ("auto", "plain", "compiled"):
        raise ValueError(f"form {form!r} is not known; choose one of: auto, plain, compiled")
    # A pointer to no tokens says that an argument is not there.
    return x.numel() > 0 and (form == "compiled" or (form == "auto" and _fits(x.device.type, x.dtype, size, headed)))


@constant
def _fits(device: str, dtype: torch.dtype, size: int, headed: bool) -> bool:
    sizes = device == "cpu" or (size in SIZES if headed else size % 4 == 0)
    return sizes and dtype in TAKEN.get(device, ()) and _available(device)


@cache
def _available(device: str) -> bool:
    try:
        return _library(device) is not None
    except RuntimeError:  # no compiler: `backends.choose` says so
        return False


def _library(device: str) -> Library:
    return (native.CPU if device == "cpu" else cuda.RECURRENT).library


def run(
    name: str, tensors: Tensors, heads: int, size: int, dtype: torch.dtype, borders: Tensor | None = None
) -> list[Tensor]:
    """The results of an op."""
    op = getattr(torch.ops.infctx, name).default
    return op(list(tensors), borders, heads, size, dtype)  # type: ignore[no-any-return]


@cache
def _dtypes(*found: torch.dtype | None) -> Tensor:
    return torch.tensor([0 if x is None else DTYPES[x] for x in found], dtype=torch.int32, device="cpu")


def _compute(
    name: str, way: str, inputs: Tensors, results: Specs, borders: Tensor | None, heads: int, size: int
) -> list[Tensor]:
    """Call a function of the library. Args: way: forward or backward, which takes a workspace after its results."""
    dense = [None if x is None else x.contiguous() for x in inputs]
    first = dense[0]
    assert first is not None
    made = [None if x is None else torch.empty(x[0], dtype=x[1], device=first.device) for x in results]
    library, wide = _library(first.device.type), torch.promote_types(first.dtype, torch.float32)
    tokens = first.numel() // (heads * size if borders is None else size)
    call = make_call(first, borders, tokens, heads, size, wide)
    arrays = [*dense, *made]
    if way == "backward":
        arrays.append(first.new_empty(library.workspace(name, call) // wide.itemsize, dtype=wide))
    dtypes = _dtypes(*(None if x is None else x.dtype for x in arrays))
    library.call(f"{name}_{way}", call, [*arrays, dtypes])
    return [x for x in made if x is not None]


def _empty(like: Tensor, found: Specs) -> list[Tensor]:
    return [torch.empty(x[0], dtype=x[1], device=like.device) for x in found if x is not None]


def _gradients(inputs: Tensors) -> Specs:
    return [None if x is None else (x.shape, x.dtype) for x in inputs]


def _declare(name: str, results: Callable[..., Specs], keeps_result: bool = False) -> None:
    """Declare an op and its gradient to torch, below `custom_op`, which takes 0.2 ms for an op with lists of tensors.

    Args:
        results: of the inputs, heads, size and dtype.
        keeps_result: whether backward takes the result instead of the input.
    """

    def forward(inputs: Tensors, borders: Tensor | None, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
        return _compute(name, "forward", inputs, results(inputs, heads, size, dtype), borders, heads, size)

    def backward(
        inputs: Tensors, borders: Tensor | None, heads: int, size: int, dtype: torch.dtype, grads: list[Tensor]
    ) -> list[Tensor]:
        parts = iter(grads)
        padded = [None if x is None else next(parts) for x in results(inputs, heads, size, dtype)]
        return _compute(name, "backward", [*inputs, *padded], _gradients(inputs), borders, heads, size)

    NAMESPACE.define(f"{name}({SCHEMA}) -> Tensor[]")
    NAMESPACE.define(f"{name}_backward({SCHEMA}, Tensor[] grads) -> Tensor[]")
    for device in ("CPU", "CUDA"):
        NAMESPACE.impl(name, forward, device)
        NAMESPACE.impl(f"{name}_backward", backward, device)
    fakes = {
        name: lambda inputs, borders, *options: _empty(inputs[0], results(inputs, *options)),
        f"{name}_backward": lambda inputs, *_: _empty(inputs[0], _gradients(inputs)),
    }
    for function, fake in fakes.items():
        torch.library.register_fake(f"infctx::{function}", fake, lib=NAMESPACE)
    NAMESPACE.impl(name, _differentiable(name, keeps_result), "Autograd")


def _differentiable(name: str, keeps_result: bool) -> Callable[..., list[Tensor]]:
    op, back = (getattr(torch.ops.infctx, x).default for x in (name, f"{name}_backward"))

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, borders: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
            ctx.options, inputs = rest[:3], rest[3:]
            with torch._C._AutoDispatchBelowAutograd():
                made = op(list(inputs), borders, *ctx.options)
            ctx.save_for_backward(borders, *(made if keeps_result else inputs))
            return tuple(made)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            borders, *kept = ctx.saved_tensors
            found = iter(back(kept, borders, *ctx.options, list(grads)))
            return None, None, None, None, *(None if x is None else next(found) for x in kept)

    def call(inputs: Tensors, borders: Tensor | None, *options: Any) -> list[Tensor]:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return list(Gradient.apply(borders, *options, *inputs))
        with torch._C._AutoDispatchBelowAutograd():
            return op(inputs, borders, *options)  # type: ignore[no-any-return]

    return call


def _shift_mix(inputs: Tensors, heads: int, size: int, dtype: torch.dtype) -> Specs:
    x, carried, *_ = inputs
    assert x is not None and carried is not None
    return [*[(x.shape, dtype)] * heads, (carried.shape, carried.dtype)]


def _prepare(inputs: Tensors, heads: int, size: int, dtype: torch.dtype) -> Specs:
    low, w0, value = inputs[0], inputs[3], inputs[8]
    assert low is not None and w0 is not None
    shape = (*low.shape[:-1], heads, size)
    return [(shape, w0.dtype), *[(shape, dtype)] * 3, None if value is None else (shape, dtype)]


def _output(inputs: Tensors, heads: int, size: int, dtype: torch.dtype) -> Specs:
    assert inputs[1] is not None  # the gate
    return [(inputs[1].shape, dtype)]


_declare("shift_mix", _shift_mix)
_declare("relu_squared", lambda inputs, heads, size, dtype: [(inputs[0].shape, dtype)], keeps_result=True)
_declare("rwkv7_prepare", _prepare)
_declare("rwkv7_output", _output)
_declare("rwkv6_output", _output)
