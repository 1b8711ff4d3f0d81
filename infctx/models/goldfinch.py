"""GoldFinch: RWKV-6 layers without gate or bonus (Finch-C2), then attention over a compressed key cache (GOLD).

B rows, T tokens, C channels, R compressed, H heads, N channels per head. Goldstein et al. 2024, arXiv:2407.12077;
initial values as the official trainer's. Attention reads every position so far: time is quadratic in the document.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models import rwkv6
from infctx.models.gold import Tables, gold_attention
from infctx.models.layers import Depth, Shared, bonus, channel_ratio, decay_speed, linear, parameters, token_shift
from infctx.ops import wkv6
from infctx.state import BlockState, KeyMemory, ragged_append


def time_mix(config: ModelConfig, layer: int) -> nn.Module:
    """Finch-C2 in the lower layers, GOLD in the upper n_gold."""
    assert config.n_gold is not None
    return (FinchC2 if layer < config.n_layer - config.n_gold else Gold)(config, layer)


class FinchC2(nn.Module):
    """RWKV-6 whose keys shrink with the decay, and whose own token enters by a second value instead of a bonus."""

    mixes = ("r", "k", "v", "w", "v2")  # in the order of the slices of time_maa_w1 and time_maa_w2
    lr_scale: ClassVar[dict[str, float]] = {"time_decay": 2.0}
    time_maa_x: Tensor  # as in RWKV-6
    time_maa_r: Tensor
    time_maa_w1: Tensor
    time_maa_w2: Tensor
    time_decay: Tensor
    time_decay_w1: Tensor
    time_decay_w2: Tensor
    time_value2_w1: Tensor  # (C, rank) what the second value adds to the first
    time_value2_w2: Tensor  # (rank, C)
    time_faaaa: Tensor  # (H, N) in published files, and without use: kept, never trained

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, n, self.depth = config.n_embd, config.head_size, Depth(layer, config.n_layer)
        mix = config.ranks["mix"]
        parameters(self, (1, 1, c), "time_maa_x time_maa_r time_maa_k time_maa_v time_maa_w time_maa_v2 time_decay")
        parameters(self, (c, 5 * mix), "time_maa_w1")
        parameters(self, (5, mix, c), "time_maa_w2")
        for name, rank in (("time_decay", config.ranks["decay"]), ("time_value2", config.ranks["value2"])):
            parameters(self, (c, rank), f"{name}_w1")
            parameters(self, (rank, c), f"{name}_w2")
        parameters(self, (c // n, n), "time_faaaa", trained=False)
        self.receptance, self.key, self.value, self.output = (linear(c, c) for _ in range(4))
        self.ln_x = nn.LayerNorm(c)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C) after ln1. Returns: what is added to the residual, shared, and the state after."""
        (xr, xk, xv, xw, xv2), att_shift = rwkv6.data_dependent_mixes(self, x, state.att_shift, shared)
        w = rwkv6.data_dependent_decay(self, xw, state.wkv.dtype)
        k = self.key(xk) * -torch.expm1(w)
        r, k, v, w = (y.unflatten(-1, self.time_faaaa.shape) for y in (self.receptance(xr), k, self.value(xv), w))
        none = torch.zeros_like(self.time_faaaa, dtype=w.dtype)
        y, wkv = wkv6(r, k, v, w, none, state.wkv, shared.cu_seqlens, shared.kernel)
        v2 = self.value(xv2) + torch.tanh(xv2 @ self.time_value2_w1) @ self.time_value2_w2
        return self.output(self.ln_x(y.flatten(2) + v2)), shared, state._replace(att_shift=att_shift, wkv=wkv)

    def initial_wkv(self, zeros: Tensor) -> Tensor:
        """(N, H, V, K) zeros. Args: zeros (N, C)."""
        h, n = self.time_faaaa.shape
        return zeros.new_zeros(len(zeros), h, n, n)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c, down, up = self.time_maa_x.numel(), self.depth.down, self.depth.up
        for name, power in {"x": 1, "k": 1, "w": 1, "r": 0.5}.items():
            getattr(self, f"time_maa_{name}").copy_(1 - channel_ratio(c) ** (power * down))
        for name in ("v", "v2"):
            getattr(self, f"time_maa_{name}").copy_(1 - (channel_ratio(c) ** down + 0.3 * up))
        for name in ("time_maa", "time_decay", "time_value2"):
            getattr(self, f"{name}_w1").zero_()
            nn.init.uniform_(getattr(self, f"{name}_w2"), -0.01, 0.01)
        self.time_decay.copy_(decay_speed(c, self.depth).view_as(self.time_decay))
        self.time_faaaa.copy_(bonus(c, self.depth).view_as(self.time_faaaa))
        for part, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            nn.init.orthogonal_(part.weight, gain=gain)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(self.depth.ln_x)


class Gold(nn.Module):
    """Attention whose keys and values are rebuilt from tokens and compressed keys: it has no state of its own."""

    time_maa_x: Tensor  # time_maa_*: (1, 1, C) how much of the position before is mixed in
    time_maa_q: Tensor
    time_maa_v: Tensor
    time_maa_q_w1: Tensor  # (C, rank)
    time_maa_q_w2: Tensor  # (rank, C)
    time_maa_kv_w1: Tensor
    time_maa_kv_w2: Tensor
    time_key_w1: Tensor
    time_value_w1: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, ranks = config.n_embd, config.ranks
        self.depth, self.heads = Depth(layer, config.n_layer), c // config.head_size
        parameters(self, (1, 1, c), "time_maa_x time_maa_q time_maa_k time_maa_v time_maa_v_cache")
        parameters(self, (c, ranks["query"]), "time_maa_q_w1")
        parameters(self, (ranks["query"], c), "time_maa_q_w2")
        parameters(self, (c, 2 * ranks["keyvalue"]), "time_maa_kv_w1")
        parameters(self, (2, ranks["keyvalue"], c), "time_maa_kv_w2")
        parameters(self, (c, ranks["expand"]), "time_key_w1 time_value_w1")
        parameters(self, (ranks["expand"], c), "time_key_w2 time_value_w2")
        self.query, self.output = linear(c, c), linear(c, c)
        self.ln_q, self.ln_k, self.ln_v, self.ln_x = (nn.LayerNorm(c) for _ in range(4))
        # It adds the same to all scores of a query, which the softmax takes away: its gradient would be rounding alone,
        # and Adam makes whole steps of that.
        self.ln_k.bias.requires_grad_(False)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C) after ln1. Returns: what is added to the residual, shared, and the state after."""
        previous, att_shift = token_shift(x, state.att_shift, shared.packing)
        dx = previous - x
        low = torch.tanh((x + dx * self.time_maa_x) @ self.time_maa_q_w1) @ self.time_maa_q_w2
        q = self.ln_q(self.query(x + dx * (self.time_maa_q + low))).unflatten(-1, (self.heads, -1)).flatten(0, 1)
        own = {name: self.get_parameter(_NAMES.get(name, name)) for name in Tables._fields[4:]}
        assert shared.memory is not None
        y = gold_attention(q, shared.memory, _borders(shared, x), Tables(*shared.tables, **own))
        return self.output(self.ln_x(y.view_as(x))), shared, state._replace(att_shift=att_shift)

    def initial_wkv(self, zeros: Tensor) -> Tensor:
        """(N, 0). Args: zeros (N, C)."""
        return zeros[:, :0]

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        c, down, up = self.time_maa_x.numel(), self.depth.down, self.depth.up
        for name, power in {"x": 1, "k": 1, "v_cache": 1, "q": 0.5}.items():
            getattr(self, f"time_maa_{name}").copy_(1 - channel_ratio(c) ** (power * down))
        self.time_maa_v.copy_(1 - (channel_ratio(c) ** down + 0.3 * up))
        for name in ("time_maa_q", "time_maa_kv", "time_key", "time_value"):
            getattr(self, f"{name}_w1").zero_()
            nn.init.uniform_(getattr(self, f"{name}_w2"), -0.01, 0.01)
        nn.init.orthogonal_(self.query.weight)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(self.depth.ln_x)


class ChannelMix(rwkv6.ChannelMix):
    """RWKV-6's, with mixes that start elsewhere."""

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values."""
        super().reset()
        for mix in (self.time_maa_k, self.time_maa_r):
            mix.copy_(1 - channel_ratio(mix.numel()) ** self.depth.down)


_NAMES = {f"ln_{x}_{part}": f"ln_{x}.{part}" for x in "kv" for part in ("weight", "bias")}


def token_cat(model: Any, x: Tensor, shared: Shared, memory: KeyMemory) -> Shared:
    """Compress what the Finch layers made of each token, and add it to what is remembered. Args: x (B, T, C)."""
    low = model.w_kv_cache_a(x).flatten(0, 1)
    tables = (model.emb.weight, *model.blocks[0].ln0.parameters(), model.w_kv_cache_b.weight)
    grown = ragged_append(memory, shared.tokens.flatten().int(), low, _borders(shared, x))
    return shared._replace(memory=grown, tables=tables)


def _borders(shared: Shared, x: Tensor) -> Tensor:
    if shared.cu_seqlens is not None:
        return shared.cu_seqlens
    b, t = x.shape[:2]
    return torch.arange(b + 1, dtype=torch.int32, device=x.device) * t
