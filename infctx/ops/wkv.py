"""The public recurrences: checked, declared to torch with their gradients, and sent to a backend.

Layout (B, T, H, N), states (sequences, H, V, K) in float32 (float64 where the inputs are). With `cu_seqlens`, B is 1
and the T tokens are sequences end to end, each with its own state in and out.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from infctx.ops import chunked, reference

log = logging.getLogger(__name__)

# The compiled CPU kernel, CUDA and flash-linear-attention add a row each.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}


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
    _check((r, w, k, v, a, b), state, cu_seqlens)
    # Tiles are made for many tokens: one at a time, as generation needs them, the plain recurrence is faster.
    name = "reference" if backend == "auto" and r.shape[1] == 1 else choose(backend, r.device.type)
    return torch.ops.infctx.wkv7(r, w, k, v, a, b, state, cu_seqlens, name)


def choose(backend: str, device: str) -> str:
    """The backend's name for a device type; says once what "auto" came to.

    Raises: ValueError if there is no such backend.
    """
    if backend == "auto":
        return _announce("chunked", device)
    if backend not in BACKENDS:
        raise ValueError(f"kernel {backend!r} is not known; choose one of: auto, {', '.join(BACKENDS)}")
    return backend


@cache
def _announce(name: str, device: str) -> str:
    log.info("wkv kernel on %s: %s", device, name)
    return name


@torch.library.custom_op("infctx::wkv7", mutates_args=())
def _wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = tuple(x.flatten(0, 1).to(state.dtype) for x in (r, w, k, v, a, b))
    with torch.autocast(r.device.type, enabled=False):  # it would reach the backend's own matrix products
        y, last = BACKENDS[backend].wkv7_forward(inputs, state, _lengths(r, cu_seqlens))
    return y.view(v.shape).to(v.dtype, copy=True), last


@_wkv7.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)


@torch.library.custom_op("infctx::wkv7_backward", mutates_args=())
def _wkv7_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, backend: str, dy: Tensor, dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *inputs, dy = (x.flatten(0, 1).to(state.dtype) for x in (r, w, k, v, a, b, dy))
    with torch.autocast(r.device.type, enabled=False):
        *grads, dlast = BACKENDS[backend].wkv7_backward(tuple(inputs), state, dy, dstate, _lengths(r, cu_seqlens))
    dr, dw, dk, dv, da, db = (g.view(x.shape).to(x.dtype) for g, x in zip(grads, (r, w, k, v, a, b), strict=True))
    return dr, dw, dk, dv, da, db, dlast


@_wkv7_backward.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, backend, dy, dstate):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, w, k, v, a, b, state))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens, backend = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)
    ctx.backend = backend


def _backward(ctx, dy, dstate):  # type: ignore[no-untyped-def]
    return *torch.ops.infctx.wkv7_backward(*ctx.saved_tensors, ctx.backend, dy, dstate), None, None


_wkv7.register_autograd(_backward, setup_context=_setup)


def _lengths(r: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    return [r.shape[1]] * r.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()


def _check(inputs: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor | None) -> None:
    shape = inputs[0].shape
    if len(shape) != 4 or any(x.shape != shape for x in inputs):
        raise ValueError(f"r, w, k, v, a, b must all be (B, T, H, N), got {[tuple(x.shape) for x in inputs]}")
    n = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state.shape != (n, shape[2], shape[3], shape[3]):
        raise ValueError(
            f"state must be (sequences, H, N, N) = {(n, shape[2], shape[3], shape[3])}, got {tuple(state.shape)}"
        )
    wanted = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"state must be {wanted} for {inputs[0].dtype} inputs, got {state.dtype}")
    if cu_seqlens is not None and shape[0] != 1:
        raise ValueError(f"cu_seqlens needs B = 1 with the sequences end to end along T, got B = {shape[0]}")
