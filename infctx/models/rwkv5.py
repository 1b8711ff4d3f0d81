"""RWKV-5 (Eagle): a matrix state of each head under a constant decay; 5.2, and the previews 5.0 and 5.1.

B rows, T tokens, C channels, H heads, N = C / H channels per head. Peng et al. 2024, arXiv:2404.05892, section 4;
initial values as the official trainer's.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models import rwkv4
from infctx.models.layers import (
    Depth,
    Shared,
    bonus,
    channel_ratio,
    decay_speed,
    linear,
    log_decay,
    parameters,
)
from infctx.ops import fused, wkv6
from infctx.ops.fused import GROUP_NORM_EPS
from infctx.state import BlockState, computing_dtype


class TimeMix(nn.Module):
    """Time mixing: reads and writes the (V, K) matrix state of each head."""

    lr_scale: ClassVar[dict[str, float]] = {"time_decay": 2.0, "time_first": 3.0}
    time_decay: Tensor  # (H, N), previews (H,): log of minus the log decay
    time_mix_k: Tensor  # time_mix_*: (1, 1, C) how much of the current token is mixed in
    time_mix_v: Tensor
    time_mix_r: Tensor
    time_mix_g: Tensor  # 5.1 and 5.2: of the gate

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, n, self.depth = config.n_embd, config.head_size, Depth(layer, config.n_layer)
        preview, self.gated, self.size = config.arch != "rwkv5", not config.arch.startswith("rwkv5.0"), n
        # What the current token counts for: a number as it is, or its logarithm in the first previews.
        self.bonus = "time_first" if config.arch in ("rwkv5.0", "rwkv5.1") else "time_faaaa"
        parameters(self, (c // n,) if preview else (c // n, n), f"time_decay {self.bonus}")
        parameters(self, (1, 1, c), "time_mix_k time_mix_v time_mix_r" + (" time_mix_g" if self.gated else ""))
        self.receptance, self.key, self.value, self.output = (linear(c, c) for _ in range(4))
        if self.gated:
            self.gate = linear(c, c)
        self.ln_x = nn.GroupNorm(c // n, c, eps=GROUP_NORM_EPS)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C) after ln1. Returns: what is added to the residual, shared, and the state after."""
        mixes = (self.time_mix_k, self.time_mix_v, self.time_mix_r) + ((self.time_mix_g,) if self.gated else ())
        low, form = computing_dtype(x), shared.form
        (xk, xv, xr, *xg), att_shift = fused.shift_mix(
            x, shared.preceding(x, state.att_shift), [1 - mix for mix in mixes], shared.packing, low, form=form
        )
        r, k, v = (y.unflatten(-1, (-1, self.size)) for y in (self.receptance(xr), self.key(xk), self.value(xv)))
        u, w = getattr(self, self.bonus).to(state.wkv.dtype), log_decay(self.time_decay, state.wkv.dtype)
        u = torch.exp(u) if self.bonus == "time_first" else u
        u, w = (y.view(k.shape[2], -1).expand(k.shape[2:]) for y in (u, w))  # (H, N)
        y, wkv = shared.recurrence(wkv6, (r, k, v, w.expand(k.shape), u), state.wkv)
        if self.gated:
            y = fused.rwkv6_output(y, self.gate(*xg), self.ln_x.weight, self.ln_x.bias, low, form)
        else:
            y = self.ln_x(y.flatten(0, 1).flatten(1)).view_as(x)
        return self.output(y), shared, state._replace(att_shift=att_shift, wkv=wkv)

    def initial_wkv(self, zeros: Tensor) -> Tensor:
        """(N, H, V, K) zeros. Args: zeros (N, C)."""
        return zeros.new_zeros(len(zeros), zeros.shape[1] // self.size, self.size, self.size)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c, down, up = self.time_mix_k.numel(), self.depth.down, self.depth.up
        self.time_decay.copy_(decay_speed(self.time_decay.numel(), self.depth).view_as(self.time_decay))
        u = getattr(self, self.bonus)
        u.copy_(bonus(u.numel(), self.depth).view_as(u) if self.bonus == "time_faaaa" else torch.full_like(u, -3.0))
        self.time_mix_k.copy_(channel_ratio(c) ** down)
        self.time_mix_v.copy_(channel_ratio(c) ** down + 0.3 * up)
        self.time_mix_r.copy_(channel_ratio(c) ** (0.5 * down))
        if self.gated:
            self.time_mix_g.copy_(channel_ratio(c) ** (0.5 * down))
            nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(self.depth.ln_x)
        self.ln_x.bias.zero_()


class ChannelMix(rwkv4.ChannelMix):
    """As RWKV-4's; the matrix is drawn without its larger gain."""

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        super().reset()
        nn.init.orthogonal_(self.key.weight)
