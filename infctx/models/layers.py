"""What the architectures share: where sequences begin and end in a row of tokens, the token shift, initial values.

B rows, T tokens, C channels, N sequences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from infctx.ops.fused import Packing, pack_sequences, token_shift
from infctx.state import KeyMemory

__all__ = ["Packing", "pack_sequences", "token_shift"]


class Split(Protocol):
    """A segment whose tokens are split over ranks: what goes between them inside a layer. See `parallel.scan`."""

    def preceding(self, x: Tensor, carried: Tensor) -> Tensor:
        """As `Shared.preceding`."""

    def recurrence(
        self, op: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor]:
        """As `Shared.recurrence`."""


class Shared(NamedTuple):
    """What goes down the layers inside a segment."""

    kernel: str
    form: str  # of what is around the recurrence: see `ops.fused`
    tokens: Tensor  # (B, T) int64
    embedded: Tensor  # (B, T, C) embeddings after ln0
    packing: Packing | None = None
    v_first: Tensor | None = None  # RWKV-7: the values of layer 0
    memory: KeyMemory | None = None  # GoldFinch: from TokenCat on, with this segment's keys
    tables: Any = None  # GoldFinch: the weights that turn tokens and compressed keys into keys and values
    split: Split | None = None  # where other ranks have the tokens before and after

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Borders of the sequences, if they are packed."""
        return self.packing.cu_seqlens if self.packing else None

    def preceding(self, x: Tensor, carried: Tensor) -> Tensor:
        """What precedes the first token of each sequence (N, C). Args: x (B, T, C), carried (N, C)."""
        return carried if self.split is None else self.split.preceding(x, carried)

    def recurrence(
        self, op: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Its results for the tokens, and its state after them. Args: op of `ops`, its inputs, its state before."""
        if self.split is not None:
            return self.split.recurrence(op, inputs, state, self.kernel)
        return op(*inputs, state, self.cu_seqlens, self.kernel)


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
