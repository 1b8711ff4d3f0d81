"""The public recurrences: checked, declared to torch with their gradients, and sent to a backend.

Layout (B, T, H, N), states (sequences, H, V, K) in float32 (float64 where the inputs are). With `cu_seqlens`, B is 1
and the T tokens are sequences end to end, each with its own state in and out.
"""

import logging
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from infctx.ops import chunked, reference

log = logging.getLogger(__name__)

# The compiled CPU kernel, CUDA and flash-linear-attention add a row each.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """y_t = (N + e^(u+k) v) / (D + e^(u+k)) ; N <- e^w N + e^k v ; D <- e^w D + e^k   (RWKV-4, arXiv:2305.13048, 3.2).

    Args:
        w, u: (C,) log decay <= 0, and the bonus of the current token. k, v: (B, T, C), any T >= 0.
        state: (B, 3, C) n, d and exponent m with N = n e^m and D = d e^m, or (sequences, 3, C) with cu_seqlens. Nothing
            read yet: 0, 0, -1e38. The exponent has no gradient; those of n and d are taken at the stored exponent.
        cu_seqlens, backend: as `wkv7`.
    Returns: y (B, T, C) in the dtype of v, and the outgoing state. Raises: as `wkv7`.
    """
    n = _check({"k": k, "v": v}, cu_seqlens, 3)
    _require(w.shape == u.shape == v.shape[2:], f"w and u must be (C,), got {tuple(w.shape)} and {tuple(u.shape)}")
    _check_state(state, (n, 3, v.shape[2]), v)
    return torch.ops.infctx.wkv4(w, u, k, v, state, cu_seqlens, _backend(backend, v))


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = (S + v (u k)^T) r ; S <- S diag(e^w) + v k^T   (RWKV-5 and RWKV-6, arXiv:2404.05892, section 4).

    Args:
        r, k, v, w: (B, T, H, N), any T >= 0; w is the log decay, <= 0 without bound.
        u: (H, N) the bonus of the current token.
        state: (B, H, N, N) as (value, key), or (sequences, H, N, N) with cu_seqlens. cu_seqlens, backend: as `wkv7`.
    Returns: y (B, T, H, N) in the dtype of v, and the outgoing state. Raises: as `wkv7`.
    """
    n = _check({"r": r, "k": k, "v": v, "w": w}, cu_seqlens, 4)
    heads, size = v.shape[2:]
    _require(u.shape == (heads, size), f"u must be (H, N) = {(heads, size)}, got {tuple(u.shape)}")
    _check_state(state, (n, heads, size, size), v)
    return torch.ops.infctx.wkv6(r, k, v, w, u, state, cu_seqlens, _backend(backend, v))


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S <- S diag(e^w) + (S a) b^T + v k^T ; y = S r   (RWKV-7, arXiv:2503.14456, section 4).

    Args:
        r, w, k, v, a, b: (B, T, H, N), any T >= 0; w is the log decay, <= 0.
        state: (B, H, N, N) as (value, key), or (sequences, H, N, N) with cu_seqlens; float32, or float64 as the inputs.
        cu_seqlens: (sequences + 1,) int32 or int64, borders of the sequences, from 0 to T; needs B = 1.
        backend: a key of BACKENDS, or "auto".
    Returns:
        y (B, T, H, N) in the dtype of v, and the outgoing state. Both carry gradients to all inputs and to the state.
    Raises:
        ValueError: shapes, dtypes or backend do not fit.
    """
    n = _check({"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, cu_seqlens, 4)
    heads, size = v.shape[2:]
    _check_state(state, (n, heads, size, size), v)
    return torch.ops.infctx.wkv7(r, w, k, v, a, b, state, cu_seqlens, _backend(backend, v))


def choose(backend: str, device: str) -> str:
    """The backend's name for a device type; says once what "auto" came to.

    Raises: ValueError if there is no such backend.
    """
    if backend == "auto":
        return "chunked" if torch.compiler.is_compiling() else _announce("chunked", device)
    if backend not in BACKENDS:
        raise ValueError(f"kernel {backend!r} is not known; choose one of: auto, {', '.join(BACKENDS)}")
    return backend


@cache
def _announce(name: str, device: str) -> str:
    log.info("wkv kernel on %s: %s", device, name)
    return name


def _backend(backend: str, v: Tensor) -> str:
    # Tiles are made for many tokens: one at a time, as generation needs them, the plain recurrence is faster.
    return "reference" if backend == "auto" and v.shape[1] == 1 else choose(backend, v.device.type)


def _declare(name: str, inputs: str, constants: str = "") -> None:
    """Declare an op and its gradient to torch. Args: names of the inputs in order; constants: those without tokens."""
    names = inputs.split()
    tokens = [x not in constants.split() for x in names]
    at_v, count = names.index("v"), len(names)
    given = ", ".join(f"Tensor {x}" for x in names) + ", Tensor state, Tensor? cu_seqlens, str backend"

    def prepared(args: Any) -> tuple[tuple[Tensor, ...], Tensor, list[int], Any]:
        tensors, (state, cu_seqlens, backend) = args[:count], args[count : count + 3]
        flat = tuple((x.flatten(0, 1) if t else x).to(state.dtype) for x, t in zip(tensors, tokens, strict=True))
        return flat, state, _lengths(tensors[at_v], cu_seqlens), BACKENDS[backend]

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        flat, state, lengths, module = prepared(args)
        with torch.autocast(state.device.type, enabled=False):  # it would reach the backend's own matrix products
            y, last = getattr(module, f"{name}_forward")(flat, state, lengths)
        return y.view(args[at_v].shape).to(args[at_v].dtype, copy=True), last

    def backward(*args: Any) -> tuple[Tensor, ...]:
        flat, state, lengths, module = prepared(args)
        dy, dstate = args[-2].flatten(0, 1).to(state.dtype), args[-1]
        with torch.autocast(state.device.type, enabled=False):
            *grads, first = getattr(module, f"{name}_backward")(flat, state, dy, dstate, lengths)
        return *(g.view(x.shape).to(x.dtype) for g, x in zip(grads, args[:count], strict=True)), first

    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.backend = inputs[-1]

    def gradient(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        call = getattr(torch.ops.infctx, f"{name}_backward")
        return *call(*ctx.saved_tensors, ctx.backend, dy, dstate), None, None

    out = ", ".join(["Tensor"] * (count + 1))
    op = torch.library.custom_op(f"infctx::{name}", forward, mutates_args=(), schema=f"({given}) -> (Tensor, Tensor)")
    back = torch.library.custom_op(
        f"infctx::{name}_backward", backward, mutates_args=(), schema=f"({given}, Tensor dy, Tensor dstate) -> ({out})"
    )
    op.register_fake(lambda *args: (empty(args[at_v]), empty(args[count])))
    back.register_fake(lambda *args: tuple(empty(x) for x in args[: count + 1]))
    op.register_autograd(gradient, setup_context=setup)


def _lengths(v: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is None:
        return [v.shape[1]] * v.shape[0]
    borders = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(borders)]
    _require(
        borders[0] == 0 and borders[-1] == v.shape[1] and min(lengths, default=0) >= 0,
        f"cu_seqlens must rise from 0 to T = {v.shape[1]}, got {borders[:4]} ... {borders[-1]}",
    )
    return lengths


def _require(true: bool, message: str) -> None:
    if not true:
        raise ValueError(message)


def _check(inputs: dict[str, Tensor], cu_seqlens: Tensor | None, axes: int) -> int:
    """The number of sequences, if the shapes fit."""
    shapes = {x.shape for x in inputs.values()}
    layout = {3: "(B, T, C)", 4: "(B, T, H, N)"}[axes]
    if len(shapes) != 1 or len(next(iter(shapes))) != axes:
        found = [tuple(x.shape) for x in inputs.values()]
        raise ValueError(f"{', '.join(inputs)} must all be {layout}, got {found}")
    rows = next(iter(shapes))[0]
    _require(
        cu_seqlens is None or rows == 1, f"cu_seqlens needs B = 1 with the sequences end to end along T, got B = {rows}"
    )
    return rows if cu_seqlens is None else len(cu_seqlens) - 1


def _check_state(state: Tensor, shape: tuple[int, ...], v: Tensor) -> None:
    layout = "(sequences, 3, C)" if len(shape) == 3 else "(sequences, H, N, N)"
    _require(state.shape == shape, f"state must be {layout} = {shape}, got {tuple(state.shape)}")
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    _require(state.dtype == wanted, f"state must be {wanted} for {v.dtype} inputs, got {state.dtype}")


_declare("wkv4", "w u k v", constants="w u")
_declare("wkv6", "r k v w u", constants="u")
_declare("wkv7", "r w k v a b")
