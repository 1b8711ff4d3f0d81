"""flash-linear-attention's RWKV-6 and RWKV-7 in Triton: for GPUs without a CUDA compiler and of other makers.

Its options are set so that its answers hold, as seen by running release 0.6.0 in Triton's interpreter:

- RWKV-7 without `safe_gate`, `lower_bound` and tiles of 64, which invert the tiles' triangular systems by their powers
  in float16: where keys repeat, the gradients of a and b are 20 % wrong.
- float32 is multiplied as float32, where Triton would take TF32. Exponents are differences of running sums of log
  decays, which lose digits where those are large: tiles of 16 tokens, and below LOWEST the portable backend.
- Log decays end at ZERO, where e^w is 0 in float32: the sums of lower ones would overflow, or leave nothing of others.

The kernels are chosen by their speed on the spot: bits may differ from run to run, and with what is packed beside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from infctx.ops import native

ZERO, LOWEST = -104.0, -16.0
DECAY = {"wkv6": 3, "wkv7": 1}


@cache
def missing(device: str) -> str | None:
    """Why this backend does not run on a device type, or None."""
    if device not in ("cuda", "xpu"):
        return f"does not run on {device}: choose auto"
    try:
        found = metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return "needs flash-linear-attention, which is not installed: pip install flash-linear-attention"
    if tuple(map(int, found.split(".")[:2])) < (0, 6):
        return f"needs fla-core 0.6 or later, found {found}: pip install -U flash-linear-attention"
    if find_spec("triton") is None:  # its distribution has another name for every maker
        return "needs triton, which is not installed: install torch as its site says for this device"
    return None


class Fla:
    """Backend of the package's ops; keeps nothing, backward runs its forward once more."""

    def __init__(self, other: Any) -> None:
        """Args: other: the backend of what this one would not compute rightly."""
        self.other = other

    def saved(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> int:
        """Nothing."""
        return 0

    def forward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        """As `Backend.forward`. Raises: ValueError for RWKV-4 and float64."""
        if not _exact(op, inputs, state):
            return self.other.forward(op, inputs, state, borders, keep)
        v = inputs[native.VALUE[op]]
        if not v.numel():
            return torch.empty_like(v), state.clone(), state.new_empty(0)
        dense = _prepare(op, inputs)
        with torch.no_grad(), _settings(dense[native.VALUE[op]]):
            y, last = _run(op, dense, state.mT.contiguous(), borders)
        return y, last.mT.contiguous(), state.new_empty(0)

    def backward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, saved: Tensor, dy: Tensor, dstate: Tensor,
        borders: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As `Backend.backward`."""
        if not _exact(op, inputs, state):
            return self.other.backward(op, inputs, state, saved, dy, dstate, borders)
        if not inputs[native.VALUE[op]].numel():
            return *(torch.zeros_like(x) for x in inputs), dstate.clone()
        leaves = [x.detach().requires_grad_() for x in (*_prepare(op, inputs), state.mT.contiguous())]
        with torch.enable_grad(), _settings(leaves[native.VALUE[op]]):
            y, last = _run(op, leaves[:-1], leaves[-1], borders)
            *grads, first = torch.autograd.grad((y, last), leaves, (dy.to(y.dtype), dstate.mT.contiguous()))
        return *grads, first.mT.contiguous()


def _exact(op: str, inputs: tuple[Tensor, ...], state: Tensor) -> bool:
    """Whether its answer is right for these inputs; for float32 that takes a look at the decays."""
    if op not in DECAY:
        raise ValueError("kernel 'fla' has no RWKV-4: choose auto or chunked")
    if state.dtype == torch.float64:
        raise ValueError("kernel 'fla' has no float64: choose chunked or reference")
    return inputs[native.VALUE[op]].dtype != torch.float32 or bool((inputs[DECAY[op]] >= LOWEST).all())


def _run(op: str, inputs: list[Tensor], state: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """y and the last states, both as their autograd function gives them: below the op torch sees no other operation."""
    packed = None if len(state) == len(inputs[0]) else borders
    if op == "wkv6":
        from fla.ops.rwkv6 import chunk_rwkv6

        r, k, v, w, u = inputs
        tile = 16 if v.dtype == torch.float32 else 64
        return chunk_rwkv6(
            r, k, v, w, u, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=packed, chunk_size=tile
        )
    from fla.ops.rwkv7 import chunk_rwkv7

    r, w, k, v, a, b = inputs
    return chunk_rwkv7(
        r, w, k, v, a, b, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=packed,
        safe_gate=False, chunk_size=16, disable_recompute=torch.is_grad_enabled(), lower_bound=None,
    )  # fmt: skip


def _prepare(op: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    dtype = inputs[native.VALUE[op]].dtype
    dense = [x.to(torch.float32 if i in native.WIDE[op] else dtype).contiguous() for i, x in enumerate(inputs)]
    dense[DECAY[op]] = dense[DECAY[op]].clamp(min=ZERO)
    return dense


@contextmanager
def _settings(v: Tensor) -> Iterator[None]:
    """float32 multiplied as it is; and no autocast, which would reach the backend's own products."""
    from triton import knobs

    with torch.autocast(v.device.type, enabled=False), knobs.language.scope():
        if v.dtype == torch.float32:
            knobs.language.fp32_default = "ieee"
        yield
