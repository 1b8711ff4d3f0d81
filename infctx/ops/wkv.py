"""The public recurrences: checked, declared to torch with their gradients, and sent to a backend.

Layout (B, T, H, N), states (sequences, H, V, K) in float32 (float64 where the inputs are). With `cu_seqlens`, B is 1
and the T tokens are sequences end to end, each with its own state in and out.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from infctx.ops.backends import BACKENDS, choose


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
    inputs = (w, u, k, v, state)
    return torch.ops.infctx.wkv4(*inputs, cu_seqlens, _choose(backend, v), _keep(*inputs))[:2]


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
    inputs = (r, k, v, w, u, state)
    return torch.ops.infctx.wkv6(*inputs, cu_seqlens, _choose(backend, v), _keep(*inputs))[:2]


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
    inputs = (r, w, k, v, a, b, state)
    return torch.ops.infctx.wkv7(*inputs, cu_seqlens, _choose(backend, v), _keep(*inputs))[:2]


def _choose(backend: str, v: Tensor) -> str:
    return choose(backend, v.device.type, v.shape[3] if v.dim() == 4 else None, v.dtype == torch.float64)


def _keep(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _declare(name: str, inputs: str) -> None:
    """Declare an op and its gradient to torch. Args: inputs: their names in order."""
    names = inputs.split()
    at_v, count = names.index("v"), len(names)
    given = ", ".join(f"Tensor {x}" for x in names) + ", Tensor state, Tensor? cu_seqlens, str backend"

    def forward(*args: Any) -> tuple[Tensor, ...]:
        tensors, (state, cu_seqlens, backend, keep), v = args[:count], args[count:], args[at_v]
        y, last, saved = BACKENDS[backend].forward(name, tensors, state, borders_of(v, cu_seqlens), keep)
        return y.view(v.shape).to(v.dtype), last, saved

    def backward(*args: Any) -> tuple[Tensor, ...]:
        tensors, (state, cu_seqlens, backend, saved, dy, dstate) = args[:count], args[count:]
        borders = borders_of(args[at_v], cu_seqlens)
        *grads, first = BACKENDS[backend].backward(name, tensors, state, saved, dy, dstate, borders)
        return *(g.view(x.shape).to(x.dtype) for g, x in zip(grads, tensors, strict=True)), first

    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def fake(*args: Any) -> tuple[Tensor, ...]:
        tensors, (state, _, backend, keep) = args[:count], args[count:]
        saved = BACKENDS[backend].saved(name, tensors, state) if keep else 0
        return empty(args[at_v]), empty(state), state.new_empty(saved)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:-2], output[2])
        ctx.backend = inputs[-2]
        ctx.set_materialize_grads(False)  # zeros for `saved` would take its memory again

    def gradient(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        dy = torch.zeros_like(tensors[at_v]) if dy is None else dy
        dstate = torch.zeros_like(tensors[count]) if dstate is None else dstate
        call = getattr(torch.ops.infctx, f"{name}_backward")
        return *call(*tensors, ctx.backend, saved, dy, dstate), None, None, None

    out = ", ".join(["Tensor"] * (count + 1))
    op = torch.library.custom_op(
        f"infctx::{name}", forward, mutates_args=(), schema=f"({given}, bool keep) -> (Tensor, Tensor, Tensor)"
    )
    back = torch.library.custom_op(
        f"infctx::{name}_backward", backward, mutates_args=(),
        schema=f"({given}, Tensor saved, Tensor dy, Tensor dstate) -> ({out})",
    )  # fmt: skip
    op.register_fake(fake)
    back.register_fake(lambda *args: tuple(empty(x) for x in args[: count + 1]))
    op.register_autograd(gradient, setup_context=setup)


def borders_of(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence begins, and the end of the last, (sequences + 1,) int64 beside v."""
    if cu_seqlens is None:
        return torch.arange(v.shape[0] + 1, device=v.device) * v.shape[1]
    if cu_seqlens.device.type == "cpu":  # on a GPU the kernels check for themselves, without a wait
        found = cu_seqlens.tolist()
        _require(
            found[0] == 0 and found[-1] == v.shape[1] and all(x <= y for x, y in pairwise(found)),
            f"cu_seqlens must rise from 0 to T = {v.shape[1]}, got {found[:4]} ... {found[-1]}",
        )
    return cu_seqlens.to(v.device, torch.int64, non_blocking=True)


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


_declare("wkv4", "w u k v")
_declare("wkv6", "r k v w u")
_declare("wkv7", "r w k v a b")
