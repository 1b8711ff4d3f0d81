"""What the models do around a recurrence: plain in torch, which is the definition, or in one pass over the tokens.

B rows, T tokens, C channels, H heads of N, S sequences (B rows, or packed in one). `form` is plain, compiled (an error
where it can not be), or auto: compiled where there is a library for the device that takes these dtypes and sizes.
Compiled forms compute in float32 (float64 if their inputs are), whatever the dtypes of inputs and results, which they
round once; they keep their inputs for backward and nothing else, and their gradients do not depend on the number of
threads.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.ops.fused_ops import compiled, run
from infctx.ops.wkv import borders_of

GROUP_NORM_EPS = 64e-5  # whatever the head size: converters that scale it by N are wrong for N != 64
SLOWEST = -math.exp(-0.5)  # log decay = SLOWEST * sigmoid(.): never below -0.6065 per token


class Packing(NamedTuple):
    """S sequences end to end in one row of T tokens; indices into [carried (S), tokens (T)]."""

    cu_seqlens: Tensor  # (S + 1,) int32
    before: Tensor  # (T,) what precedes each token
    after: Tensor  # (S,) what each sequence leaves behind; its own carried row if it has no token


def pack_sequences(cu_seqlens: Tensor, length: int) -> Packing:
    """Index the borders of sequences once for all layers. Args: cu_seqlens (S + 1,) from 0 to `length`."""
    n = len(cu_seqlens) - 1
    token = torch.arange(length, device=cu_seqlens.device)
    border = cu_seqlens.long()
    sequence = torch.searchsorted(border[1:], token, right=True)
    before = torch.where(border[sequence] == token, sequence, token + (n - 1))
    own = torch.arange(n, device=cu_seqlens.device)
    return Packing(cu_seqlens, before, torch.where(border.diff() > 0, border[1:] + (n - 1), own))


def token_shift(x: Tensor, carried: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """The token before each one (B, T, C), and what to carry on (S, C). Args: x (B, T, C), carried (S, C) float32."""
    if packing is None:
        rows = torch.cat([carried.unsqueeze(1).to(x.dtype), x], 1)
        return rows[:, :-1], rows[:, -1].clone().to(carried.dtype)  # a view would keep all rows alive
    flat = torch.cat([carried.to(x.dtype), x.squeeze(0)])
    return flat[packing.before].unsqueeze(0), flat[packing.after].to(carried.dtype)


def shift_mix(
    x: Tensor, carried: Tensor, mixes: Sequence[Tensor], packing: Packing | None, dtype: torch.dtype,
    moved: Tensor | None = None, form: str = "auto",
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """y_i = x + (previous - x) * mix_i: each token with a part of the one before it.

    Args:
        x: (B, T, C). carried: (S, C) float32 (float64 if x is), what precedes the first token of each sequence.
        mixes: n <= 6 of C numbers. moved: (n, B, T, C), what a token adds to them. dtype: of the y_i.
    Returns: the n y_i (B, T, C), and what to carry on (S, C).
    """
    if not compiled(form, x, x.shape[-1], headed=False):
        previous, last = token_shift(x, carried, packing)
        dx = previous - x
        sums = mixes if moved is None else [mix + m for mix, m in zip(mixes, moved, strict=True)]
        return [(x + dx * mix).to(dtype) for mix in sums], last
    borders = borders_of(x, packing and packing.cu_seqlens)
    wide = [mix.to(carried.dtype) for mix in mixes]
    *y, last = run("shift_mix", (x, carried, moved, *wide), len(mixes), x.shape[-1], dtype, borders)
    return y, last


def relu_squared(x: Tensor, form: str = "auto") -> Tensor:
    """max(x, 0)^2. Backward takes twice the root of the result for the slope, and does not keep x: see `fused_ops`.

    Squares below what the dtype holds have no slope then: in float16 those of x below 2e-4.
    """
    if not compiled(form, x, x.shape[-1], headed=False):
        return torch.relu(x) ** 2
    return run("relu_squared", (x,), 1, x.shape[-1], x.dtype)[0]


class Residual(NamedTuple):
    """What mixes the values of RWKV-7's first layer into those of another."""

    low: Tensor  # (B, T, C)
    base: Tensor  # (1, 1, C)
    first: Tensor  # (B, T, C) the values of the first layer


def rwkv7_prepare(
    decay: Tensor, rate: Tensor, k: Tensor, v: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, heads: int,
    dtype: torch.dtype, residual: Residual | None = None, form: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The inputs of the RWKV-7 recurrence but r.

    Args:
        decay, rate: (B, T, C) what the low-rank parts add to w0 and a0. k, v: (B, T, C).
        w0, a0, k_k, k_a: C parameters each. residual: None in the first layer.
        dtype: of the results but w, which is in float32 (float64 if k is).
    Returns: w, k, v, a, b (B, T, H, N) as `wkv7` takes them.
    """
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    size = k.shape[-1] // heads
    if not compiled(form, k, size):
        w = SLOWEST * torch.sigmoid((w0 + decay).to(wide))
        a = torch.sigmoid(a0 + rate)
        if residual is not None:
            mix = torch.sigmoid(residual.base + residual.low).to(v.dtype)
            v = torch.lerp(v, residual.first, mix)
        kk = F.normalize((k * k_k).unflatten(-1, (heads, -1)).to(wide), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * k_a)
        w, k, v, a = (x.unflatten(-1, (heads, -1)) for x in (w, k, v, a))
        return w, *(x.to(dtype) for x in (k, v, -kk, kk * a))
    parameters = [x.to(wide) for x in (w0, a0, k_k, k_a)]
    mixed = (None,) * 4 if residual is None else (residual.low, v, residual.first, residual.base.to(wide))
    w, k, a, b, *value = run("rwkv7_prepare", (decay, rate, k, *parameters, *mixed), heads, size, dtype)
    return w, k, value[0] if value else v.unflatten(-1, (heads, -1)).to(dtype), a, b


def rwkv7_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor,
    dtype: torch.dtype, form: str = "auto",
) -> Tensor:  # fmt: skip
    """(norm(y) + v sum(r k r_k)) g: the norm of each head, its bonus of the current token, and the gate.

    Args:
        y, r, k, v: (B, T, H, N). g: (B, T, C). weight, bias: (C,) of the group norm. r_k: (H, N). dtype: of the result.
    Returns: (B, T, C).
    """
    heads, size = y.shape[2:]
    if not compiled(form, y, size):
        bonus = (r * k * r_k).sum(-1, keepdim=True) * v
        return ((_group_norm(y, weight, bias) + bonus.flatten(2)) * g).to(dtype)
    wide = torch.promote_types(y.dtype, torch.float32)
    inputs = (y, g, weight.to(wide), bias.to(wide), r, k, v, r_k.to(wide))
    return run("rwkv7_output", inputs, heads, size, dtype)[0]


def rwkv6_output(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, form: str = "auto") -> Tensor:
    """norm(y) silu(g): the output of RWKV-5 and RWKV-6. Args and result: as `rwkv7_output`."""
    heads, size = y.shape[2:]
    if not compiled(form, y, size):
        return (_group_norm(y, weight, bias) * F.silu(g)).to(dtype)
    wide = torch.promote_types(y.dtype, torch.float32)
    return run("rwkv6_output", (y, g, weight.to(wide), bias.to(wide)), heads, size, dtype)[0]


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, C). Args: y (B, T, H, N)."""
    weight, bias = (x.to(torch.promote_types(x.dtype, y.dtype)) for x in (weight, bias))  # it takes no lower ones
    return F.group_norm(y.flatten(0, 1).flatten(1), y.shape[2], weight, bias, GROUP_NORM_EPS).view_as(y).flatten(2)
