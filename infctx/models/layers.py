"""What the architectures share: where sequences begin and end in a row of tokens, the token shift, initial values.

B rows, T tokens, C channels, N sequences.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infctx.state import KeyMemory


class Packing(NamedTuple):
    """N sequences end to end in one row of T tokens; indices into [carried (N), tokens (T)]."""

    cu_seqlens: Tensor  # (N + 1,) int32
    before: Tensor  # (T,) what precedes each token
    after: Tensor  # (N,) what each sequence leaves behind; its own carried row if it has no token


class Shared(NamedTuple):
    """What goes down the layers inside a segment."""

    kernel: str
    tokens: Tensor  # (B, T) int64
    embedded: Tensor  # (B, T, C) embeddings after ln0
    packing: Packing | None = None
    v_first: Tensor | None = None  # RWKV-7: the values of layer 0
    memory: KeyMemory | None = None  # GoldFinch: from TokenCat on, with this segment's keys
    tables: Any = None  # GoldFinch: the weights that turn tokens and compressed keys into keys and values

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Borders of the sequences, if they are packed."""
        return self.packing.cu_seqlens if self.packing else None


def pack_sequences(cu_seqlens: Tensor, length: int) -> Packing:
    """Index the borders of sequences once for all layers. Args: cu_seqlens (N + 1,) from 0 to `length`."""
    n = len(cu_seqlens) - 1
    token = torch.arange(length, device=cu_seqlens.device)
    border = cu_seqlens.long()
    sequence = torch.searchsorted(border[1:], token, right=True)
    before = torch.where(border[sequence] == token, sequence, token + (n - 1))
    own = torch.arange(n, device=cu_seqlens.device)
    return Packing(cu_seqlens, before, torch.where(border.diff() > 0, border[1:] + (n - 1), own))


def token_shift(x: Tensor, carried: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """The token before each one (B, T, C), and what to carry on (N, C). Args: x (B, T, C), carried (N, C) float32."""
    if packing is None:
        rows = torch.cat([carried.unsqueeze(1).to(x.dtype), x], 1)
        return rows[:, :-1], rows[:, -1].clone().to(carried.dtype)  # a view would keep all rows alive
    flat = torch.cat([carried.to(x.dtype), x.squeeze(0)])
    return flat[packing.before].unsqueeze(0), flat[packing.after].to(carried.dtype)


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A matrix without bias, as all of them are."""
    return nn.Linear(n_in, n_out, bias=False)


def parameters(module: nn.Module, shape: tuple[int, ...], names: str, trained: bool = True) -> None:
    """Register empty parameters of one shape. Args: names: separated by spaces."""
    for name in names.split():
        module.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=trained))


class Depth(NamedTuple):
    """Where a layer stands, as the official initial values use it. With one layer the first ratio is 0."""

    layer: int
    n_layer: int

    @property
    def up(self) -> float:
        """0 in the first layer, 1 in the last."""
        return self.layer / max(1, self.n_layer - 1)

    @property
    def down(self) -> float:
        """1 in the first layer, towards 0 in the last."""
        return 1 - self.layer / self.n_layer

    @property
    def ln_x(self) -> float:
        """The weight of the norm after the recurrence."""
        return ((1 + self.layer) / self.n_layer) ** 0.7


def channel_ratio(c: int) -> Tensor:
    """i / C for channel i."""
    return torch.arange(c) / c


def decay_speed(n: int, depth: Depth, lowest: float = -6.0, span: float = 5.0) -> Tensor:
    """log(-log decay) of n channels or heads, from slow to fast."""
    return lowest + span * (torch.arange(n) / max(1, n - 1)) ** (0.7 + 1.3 * depth.up)


def log_decay(speed: Tensor, dtype: torch.dtype) -> Tensor:
    """-exp(speed) in `dtype`: log decay. Beyond 80 the decay is 0 whatever the speed, and would have no gradient."""
    return -torch.exp(speed.to(dtype).clamp(max=80.0))


def zigzag(n: int) -> Tensor:
    """0, 1, -1, 0, 1, -1, ..."""
    return ((torch.arange(n) + 1) % 3 - 1).float()


def bonus(n: int, depth: Depth) -> Tensor:
    """time_faaaa of RWKV-5.2 and RWKV-6."""
    return depth.up * (1 - torch.arange(n) / max(1, n - 1)) + 0.1 * zigzag(n)
