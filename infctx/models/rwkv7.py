"""RWKV-7 (Goose): a delta rule with a decay and a learning rate per channel, low-rank and data-dependent.

B rows, T tokens, C channels, H heads, N = C / H channels per head, N_seq sequences (B rows, or packed in one row).
Peng et al. 2025, arXiv:2503.14456, section 4 and appendix; initial values as the official trainer's.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models.layers import Shared
from infctx.ops import fused, wkv7
from infctx.ops.fused import GROUP_NORM_EPS
from infctx.state import BlockState, computing_dtype


class TimeMix(nn.Module):
    """Time mixing: reads and writes the (V, K) matrix state of each head."""

    lr_scale: ClassVar[dict[str, float]] = {"w0": 2.0}
    x_r: Tensor  # x_*: (1, 1, C) how much of the token before is mixed in
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    w0: Tensor  # *0: (1, 1, C), *1: (C, rank), *2: (rank, C); w decay
    w1: Tensor
    w2: Tensor
    a0: Tensor  # a in-context learning rate
    a1: Tensor
    a2: Tensor
    v0: Tensor  # v value residual
    v1: Tensor
    v2: Tensor
    g1: Tensor  # g gate
    g2: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, n, self.layer, self.n_layer = config.n_embd, config.head_size, layer, config.n_layer
        for name in "rwkvag":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, c)))
        for name in "wavg":
            rank = config.ranks[name]
            # Published files hold layer 0's value residual, which has nothing to mix with: kept, never trained.
            trained = not (name == "v" and layer == 0)
            shapes = {f"{name}1": (c, rank), f"{name}2": (rank, c)} | ({f"{name}0": (1, 1, c)} if name != "g" else {})
            for key, shape in shapes.items():
                self.register_parameter(key, nn.Parameter(torch.empty(shape), requires_grad=trained))
        self.k_k = nn.Parameter(torch.empty(1, 1, c))
        self.k_a = nn.Parameter(torch.empty(1, 1, c))
        self.r_k = nn.Parameter(torch.empty(c // n, n))
        self.receptance, self.key, self.value, self.output = (nn.Linear(c, c, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(c // n, c, eps=GROUP_NORM_EPS)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C) after ln1. Returns: what is added to the residual, shared, and the state after."""
        low, form = computing_dtype(x), shared.form
        inner = state.wkv.dtype if x.device.type == "cpu" else low  # what the recurrence takes as it is
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        (xr, xw, xk, xv, xa, xg), att_shift = fused.shift_mix(
            x, shared.preceding(x, state.att_shift), mixes, shared.packing, low, form=form
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # (B, T, C)
        residual = None
        if shared.v_first is None:
            shared = shared._replace(v_first=v)
        else:
            residual = fused.Residual((xv @ self.v1) @ self.v2, self.v0, shared.v_first)
        w, k, v, a, b = fused.rwkv7_prepare(
            torch.tanh(xw @ self.w1) @ self.w2, (xa @ self.a1) @ self.a2, k, v,
            self.w0, self.a0, self.k_k, self.k_a, len(self.r_k), inner, residual, form,
        )  # fmt: skip
        r = r.unflatten(-1, self.r_k.shape)  # (B, T, H, N), as the others are
        y, wkv = shared.recurrence(wkv7, (r, w, k, v, a, b), state.wkv)  # wkv (N_seq, H, V, K)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        y = fused.rwkv7_output(y, r, k, v, g, self.ln_x.weight, self.ln_x.bias, self.r_k, low, form)
        return self.output(y), shared, state._replace(att_shift=att_shift, wkv=wkv)

    def initial_wkv(self, zeros: Tensor) -> Tensor:
        """(N, H, V, K) zeros. Args: zeros (N, C)."""
        h, n = self.r_k.shape
        return zeros.new_zeros(len(zeros), h, n, n)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values. With one layer the depth ratio is 0."""
        c, n = self.r_k.numel(), self.r_k.shape[1]
        depth = self.layer / max(1, self.n_layer - 1)
        upwards = 1 - self.layer / self.n_layer
        channel, linear = torch.arange(c) / c, torch.arange(c) / max(1, c - 1) - 0.5
        zigzag = 2 * (torch.arange(c) % n) / max(1, n - 1) - 1
        zigzag = zigzag * zigzag.abs()
        for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            getattr(self, f"x_{name}").copy_(1 - channel ** (power * upwards))
        decay = -6 + 6 * (linear + 0.5) ** (1 + depth**0.3)
        self.w0.copy_(decay + 0.5 + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.v0.copy_(0.73 - 0.4 * linear)
        for name in "wavg":
            getattr(self, f"{name}1").zero_()
            second = getattr(self, f"{name}2")
            nn.init.orthogonal_(second, gain=0.1 * max(1.0, second.shape[0] / second.shape[1]) ** 0.5)
        self.k_k.copy_(0.71 - 0.1 * linear)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + self.layer) / self.n_layer) ** 0.7)
        self.ln_x.bias.zero_()


class ChannelMix(nn.Module):
    """Channel mixing: a squared-ReLU layer on the token and its predecessor."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.dim_ffn is not None
        self.power = (1 - layer / config.n_layer) ** 4
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, BlockState]:
        """Args: x (B, T, C) after ln2. Returns: what is added to the residual, and the state after."""
        (xk,), ffn_shift = fused.shift_mix(
            x, shared.preceding(x, state.ffn_shift), (self.x_k,), shared.packing, computing_dtype(x), form=shared.form
        )
        k = fused.relu_squared(self.key(xk), shared.form)
        return self.value(self.scaled(k, x, shared)), state._replace(ffn_shift=ffn_shift)

    def scaled(self, k: Tensor, x: Tensor, shared: Shared) -> Tensor:
        """The hidden channels (B, T, F) as they are."""
        return k

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c = self.x_k.numel()
        self.x_k.copy_(1 - (torch.arange(c) / c) ** self.power)
        nn.init.orthogonal_(self.key.weight)
        self.value.weight.zero_()


class DeepEmbedMix(ChannelMix):
    """RWKV-7a: each token scales the hidden channels by a small matrix of its own (DeepEmbed).

    E = s_emb[token] + s_emb_x ln0(emb[token]), as (rank, rank); k *= ((x s1) E) s2 + s0. The formula is that of the
    `rwkv` package; no official initial values are published: these begin as RWKV-7 (s0 = 1, s1 = 0) with E = I.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.dim_ffn is not None
        c, rank = config.n_embd, config.ranks["embed"]
        self.s_emb = nn.Embedding(config.vocab_size, rank * rank)
        self.s_emb_x = nn.Linear(c, rank * rank, bias=False)
        self.s0 = nn.Parameter(torch.empty(1, 1, config.dim_ffn))
        self.s1 = nn.Parameter(torch.empty(c, rank))
        self.s2 = nn.Parameter(torch.empty(rank, config.dim_ffn))

    def scaled(self, k: Tensor, x: Tensor, shared: Shared) -> Tensor:
        """The hidden channels (B, T, F), scaled."""
        rank = self.s1.shape[1]
        e = (self.s_emb(shared.tokens) + self.s_emb_x(shared.embedded)).unflatten(-1, (rank, rank))
        low = torch.einsum("btr,btrs->bts", x @ self.s1, e.to(x.dtype))
        return k * (low @ self.s2 + self.s0)

    @torch.no_grad()
    def reset(self) -> None:
        """Values that leave RWKV-7 as it is."""
        super().reset()
        self.s_emb.weight.copy_(torch.eye(self.s1.shape[1]).flatten())
        self.s_emb_x.weight.zero_()
        self.s0.fill_(1.0)
        self.s1.zero_()
        nn.init.orthogonal_(self.s2, gain=0.1)
