"""RWKV-6 (Finch): RWKV-5 with a decay and mixes that depend on the data, through low-rank parts.

B rows, T tokens, C channels, H heads, N = C / H channels per head. Peng et al. 2024, arXiv:2404.05892, section 4;
initial values as the official trainer's.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models import layers
from infctx.models.layers import Depth, Shared, bonus, channel_ratio, decay_speed, linear, parameters
from infctx.ops import fused, wkv6
from infctx.ops.fused import GROUP_NORM_EPS
from infctx.state import BlockState, computing_dtype


class TimeMix(nn.Module):
    """Time mixing: reads and writes the (V, K) matrix state of each head."""

    mixes = ("w", "k", "v", "r", "g")  # in the order of the slices of time_maa_w1 and time_maa_w2
    lr_scale: ClassVar[dict[str, float]] = {"time_decay": 2.0}
    time_maa_x: Tensor  # time_maa_*: (1, 1, C) how much of the token before is mixed in
    time_maa_v: Tensor
    time_maa_w1: Tensor  # (C, 5 rank)
    time_maa_w2: Tensor  # (5, rank, C)
    time_decay: Tensor  # (1, 1, C) log of minus the log decay, before
    time_decay_w1: Tensor  # (C, rank) what depends on the data
    time_decay_w2: Tensor  # (rank, C)
    time_faaaa: Tensor  # (H, N) bonus of the current token

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, n, self.depth = config.n_embd, config.head_size, Depth(layer, config.n_layer)
        mix, decay = config.ranks["mix"], config.ranks["decay"]
        parameters(self, (1, 1, c), "time_maa_x time_maa_w time_maa_k time_maa_v time_maa_r time_maa_g time_decay")
        parameters(self, (c, 5 * mix), "time_maa_w1")
        parameters(self, (5, mix, c), "time_maa_w2")
        parameters(self, (c, decay), "time_decay_w1")
        parameters(self, (decay, c), "time_decay_w2")
        parameters(self, (c // n, n), "time_faaaa")
        self.receptance, self.key, self.value, self.gate, self.output = (linear(c, c) for _ in range(5))
        self.ln_x = nn.GroupNorm(c // n, c, eps=GROUP_NORM_EPS)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C) after ln1. Returns: what is added to the residual, shared, and the state after."""
        low, form = computing_dtype(x), shared.form
        (xw, xk, xv, xr, xg), att_shift = data_dependent_mixes(self, x, state.att_shift, shared)
        r, k, v = (y.unflatten(-1, self.time_faaaa.shape) for y in (self.receptance(xr), self.key(xk), self.value(xv)))
        w = data_dependent_decay(self, xw, state.wkv.dtype).unflatten(-1, self.time_faaaa.shape)
        y, wkv = shared.recurrence(wkv6, (r, k, v, w, self.time_faaaa), state.wkv)
        y = fused.rwkv6_output(y, self.gate(xg), self.ln_x.weight, self.ln_x.bias, low, form)
        return self.output(y), shared, state._replace(att_shift=att_shift, wkv=wkv)

    def initial_wkv(self, zeros: Tensor) -> Tensor:
        """(N, H, V, K) zeros. Args: zeros (N, C)."""
        h, n = self.time_faaaa.shape
        return zeros.new_zeros(len(zeros), h, n, n)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c, down, up = self.time_maa_x.numel(), self.depth.down, self.depth.up
        for name, power in {"x": 1, "w": 1, "k": 1, "r": 0.5, "g": 0.5}.items():
            getattr(self, f"time_maa_{name}").copy_(1 - channel_ratio(c) ** (power * down))
        self.time_maa_v.copy_(1 - (channel_ratio(c) ** down + 0.3 * up))
        self.time_decay.copy_(decay_speed(c, self.depth).view_as(self.time_decay))
        self.time_faaaa.copy_(bonus(c, self.depth).view_as(self.time_faaaa))
        for name in ("time_maa", "time_decay"):
            getattr(self, f"{name}_w1").zero_()
            nn.init.uniform_(getattr(self, f"{name}_w2"), -0.01, 0.01)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(self.depth.ln_x)
        self.ln_x.bias.zero_()


class ChannelMix(nn.Module):
    """Channel mixing: a gated squared-ReLU layer on the token and its predecessor."""

    time_maa_k: Tensor  # (1, 1, C)
    time_maa_r: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.dim_ffn is not None
        c, self.depth = config.n_embd, Depth(layer, config.n_layer)
        parameters(self, (1, 1, c), "time_maa_k time_maa_r")
        self.key, self.receptance, self.value = linear(c, config.dim_ffn), linear(c, c), linear(config.dim_ffn, c)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, BlockState]:
        """Args: x (B, T, C) after ln2. Returns: what is added to the residual, and the state after."""
        (xk, xr), ffn_shift = fused.shift_mix(
            x, shared.preceding(x, state.ffn_shift), (self.time_maa_k, self.time_maa_r), shared.packing,
            computing_dtype(x), form=shared.form,
        )  # fmt: skip
        k, r = fused.relu_squared(self.key(xk), shared.form), torch.sigmoid(self.receptance(xr))
        return r * self.value(k), state._replace(ffn_shift=ffn_shift)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c = self.time_maa_k.numel()
        for mix in (self.time_maa_k, self.time_maa_r):
            mix.copy_(1 - channel_ratio(c) ** self.depth.down**3)
        nn.init.orthogonal_(self.key.weight)
        for part in (self.receptance, self.value):
            part.weight.zero_()


def data_dependent_mixes(mixer: Any, x: Tensor, carried: Tensor, shared: Shared) -> tuple[list[Tensor], Tensor]:
    """Each token with as much of its predecessor as the data says, one (B, T, C) for each of `mixer.mixes`.

    Returns: these, and what to carry on (N, C).
    """
    dtype, packing, form = computing_dtype(x), shared.packing, shared.form
    carried = shared.preceding(x, carried)
    (first,), last = fused.shift_mix(x, carried, (mixer.time_maa_x,), packing, dtype, form=form)
    low = torch.tanh(first @ mixer.time_maa_w1).unflatten(-1, (5, -1))  # (B, T, 5, rank)
    moved = torch.einsum("btir,irc->ibtc", low, mixer.time_maa_w2)
    bases = [getattr(mixer, f"time_maa_{name}") for name in mixer.mixes]
    return fused.shift_mix(x, carried, bases, packing, dtype, moved, form)[0], last


def data_dependent_decay(mixer: Any, xw: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, C) log decay in `dtype`, below 0 and without a bound."""
    speed = mixer.time_decay + torch.tanh(xw @ mixer.time_decay_w1) @ mixer.time_decay_w2
    return layers.log_decay(speed, dtype)
