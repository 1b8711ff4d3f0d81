"""RWKV-4 (Dove): an average of values under a decay per channel, in log-sum-exp form.

B rows, T tokens, C channels, N sequences. Peng et al. 2023, arXiv:2305.13048; initial values as the official trainer's.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models.layers import (
    Depth,
    Shared,
    channel_ratio,
    decay_speed,
    linear,
    log_decay,
    parameters,
    zigzag,
)
from infctx.ops import fused, wkv4
from infctx.ops.tiles import NOTHING
from infctx.state import BlockState, computing_dtype


class TimeMix(nn.Module):
    """Time mixing: reads and writes a numerator and a denominator of each channel."""

    lr_scale: ClassVar[dict[str, float]] = {"time_decay": 2.0, "time_first": 3.0}
    time_decay: Tensor  # (C,) log of minus the log decay
    time_first: Tensor  # (C,) bonus of the current token
    time_mix_k: Tensor  # (1, 1, C) how much of the current token is mixed in
    time_mix_v: Tensor
    time_mix_r: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, self.depth = config.n_embd, Depth(layer, config.n_layer)
        parameters(self, (c,), "time_decay time_first")
        parameters(self, (1, 1, c), "time_mix_k time_mix_v time_mix_r")
        self.key, self.value, self.receptance, self.output = (linear(c, c) for _ in range(4))

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C) after ln1. Returns: what is added to the residual, shared, and the state after."""
        mixes = [1 - mix for mix in (self.time_mix_k, self.time_mix_v, self.time_mix_r)]
        (xk, xv, xr), att_shift = fused.shift_mix(
            x, shared.preceding(x, state.att_shift), mixes, shared.packing, computing_dtype(x), form=shared.form
        )
        k, v, r = self.key(xk), self.value(xv), torch.sigmoid(self.receptance(xr))
        w = log_decay(self.time_decay, state.wkv.dtype)
        y, wkv = shared.recurrence(wkv4, (w, self.time_first, k, v), state.wkv)
        return self.output(r * y), shared, state._replace(att_shift=att_shift, wkv=wkv)

    def initial_wkv(self, zeros: Tensor) -> Tensor:
        """(N, 3, C): sums of nothing. Args: zeros (N, C)."""
        return torch.stack([zeros, zeros, zeros + NOTHING], 1)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c, down, up = self.time_decay.numel(), self.depth.down, self.depth.up
        self.time_decay.copy_(decay_speed(c, self.depth, -5, 8))
        self.time_first.copy_(math.log(0.3) + 0.5 * zigzag(c))
        self.time_mix_k.copy_(channel_ratio(c) ** down)
        self.time_mix_v.copy_(channel_ratio(c) ** down + 0.3 * up)
        self.time_mix_r.copy_(channel_ratio(c) ** (0.5 * down))
        nn.init.orthogonal_(self.value.weight)
        for part in (self.key, self.receptance, self.output):
            part.weight.zero_()


class ChannelMix(nn.Module):
    """Channel mixing: a gated squared-ReLU layer on the token and its predecessor."""

    time_mix_k: Tensor  # (1, 1, C)
    time_mix_r: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.dim_ffn is not None
        c, self.depth = config.n_embd, Depth(layer, config.n_layer)
        parameters(self, (1, 1, c), "time_mix_k time_mix_r")
        self.key, self.receptance, self.value = linear(c, config.dim_ffn), linear(c, c), linear(config.dim_ffn, c)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, BlockState]:
        """Args: x (B, T, C) after ln2. Returns: what is added to the residual, and the state after."""
        mixes = (1 - self.time_mix_k, 1 - self.time_mix_r)
        (xk, xr), ffn_shift = fused.shift_mix(
            x, shared.preceding(x, state.ffn_shift), mixes, shared.packing, computing_dtype(x), form=shared.form
        )
        k = fused.relu_squared(self.key(xk), shared.form)
        return torch.sigmoid(self.receptance(xr)) * self.value(k), state._replace(ffn_shift=ffn_shift)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c = self.time_mix_k.numel()
        self.time_mix_k.copy_(channel_ratio(c) ** self.depth.down)
        self.time_mix_r.copy_(channel_ratio(c) ** self.depth.down)
        nn.init.orthogonal_(self.key.weight, gain=max(1.0, self.key.out_features / c) ** 0.5)
        for part in (self.receptance, self.value):
            part.weight.zero_()
