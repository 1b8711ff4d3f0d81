"""The recurrences of other software, called as ours are: inputs with the state (value, key) as the last of them."""

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

Kernel = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def peers(op: str, device: str, tokens: int) -> dict[str, Kernel | str]:
    """Name -> what computes an op on a device, or why it is not there."""
    absent = None if importlib.util.find_spec("fla") else "flash-linear-attention is not installed"
    if device != "cpu":
        return {"fla-layer": absent or fla_layer(op)}
    if op == "wkv7":
        return {"fla-naive": absent or ("takes multiples of 16 tokens" if tokens % 16 else fla_naive)}
    return {}


def fla_layer(op: str) -> Kernel:
    """The Triton kernels, as the package's layers call them."""
    if op == "wkv6":
        from fla.ops.rwkv6 import chunk_rwkv6 as function

        more: dict[str, Any] = {}
    else:
        from fla.ops.rwkv7 import chunk_rwkv7 as function

        more = {"safe_gate": True, "lower_bound": -0.6065306597126334, "chunk_size": 64}

    def run(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        y, last = function(*x[:-1], scale=1.0, initial_state=x[-1].mT, output_final_state=True, **more)
        return y, last.mT

    return run


def fla_naive(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The torch form of RWKV-7, in float32, which scales r, and wants heads before tokens."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise

    r, w, k, v, a, b = (t.float().transpose(1, 2) for t in x[:-1])
    y, last = dplr_chunkwise(r * r.shape[-1] ** 0.5, k, v, a, b, w, x[-1].mT, True, chunk_size=16)
    return y.transpose(1, 2).to(x[0].dtype), last.mT
