"""One segment of a window forward, and what is counted on the way.

B lanes, S segments, N sequences in a segment, M tokens in them, D numbers in a state, all of it in one row.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infctx.borders import StatesConfig
from infctx.loss import IGNORED, token_losses
from infctx.memory import WindowMemory
from infctx.segments import Sequences, Window, sequences
from infctx.state import KeyMemory, State, pack, unpack

POSITION_BUCKETS = 40  # bucket i holds positions 2^i - 1 to 2^(i+1) - 2 of a document
# Borders of a window that a line of figures has, in segments before its end: two in an octave.
DISTANCES = tuple(sorted({1 << i for i in range(32)} | {3 << i for i in range(31)}))


class Metrics(NamedTuple):
    """Sums in float64, as `window_loss` returns them."""

    loss_sum: Tensor
    tokens: Tensor
    segment_loss: Tensor
    position_loss: Tensor
    position_tokens: Tensor
    source_loss: Tensor
    source_tokens: Tensor
    border_gradient: Tensor

    @classmethod
    def zeros(cls, window: Window, device: torch.device) -> "Metrics":
        """Nothing seen yet, on the device that trains."""
        buckets, segments = POSITION_BUCKETS if window.position is not None else 0, window.tokens.shape[1]
        count = window.sources.number if window.sources is not None else 0
        sizes = ((), (), (segments,), (buckets,), (buckets,), (count,), (count,), (segments,))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, segment: int, sequence: Sequences, losses: Tensor) -> None:
        """Count a segment. Args: losses (M,)."""
        learnt, total = sequence.targets != IGNORED, losses.sum()
        self.loss_sum.add_(total)
        self.tokens.add_(learnt.sum())
        self.segment_loss[segment] = total
        if sequence.position is not None:
            bucket = torch.frexp((sequence.position + 1).double()).exponent.long() - 1
            self.position_loss.index_add_(0, bucket, losses.double())
            self.position_tokens.index_add_(0, bucket, learnt.double())
        if sequence.source is not None:
            self.source_loss.index_add_(0, sequence.source, losses.double())
            self.source_tokens.index_add_(0, sequence.source, learnt.double())

    def add_border(self, segment: int, g: Iterable[Tensor]) -> None:
        """Count what a segment hands to the one before it. Args: g: (B, D_i), together the gradient of the states."""
        for part in g:
            self.border_gradient[segment] += torch.linalg.vector_norm(part).double().square()


def by_distance(border_gradient: Tensor) -> Tensor:
    """Of a window's borders (S,), those DISTANCES before its end; 0 where it is not that long."""
    far = border_gradient.new_zeros(len(DISTANCES))
    inside = [len(border_gradient) - d for d in DISTANCES if d < len(border_gradient)]
    far[: len(inside)] = border_gradient[inside]
    return far


class Task(NamedTuple):
    """A window to be run, and what all its segments have in common."""

    model: Any
    window: Window
    like: State
    horizon: int
    normaliser: Tensor | int
    l2_penalty: float
    metrics: Metrics
    memory: WindowMemory | None
    states: StatesConfig
    carried: bool  # whether the lanes' states before the window were given; if not, they are the fresh one

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def empty(self, segment: int) -> bool:
        """Whether there is nothing to run in a segment: no lane has a token in it."""
        return not bool((self.window.ids[:, segment] >= 0).any())

    def advance(
        self, segment: int, lanes: Tensor, fresh: Tensor, past: KeyMemory | None
    ) -> tuple[Tensor | None, Sequences, Tensor, Tensor | None]:
        """Run one segment from the lanes' states (B, D).

        Returns: features (M, C), its sequences, the lanes' states after it, the keys (M, R) added to the memory.
        """
        s = sequences(self.window, segment).to(lanes.device)
        if not s.tokens.numel():
            return None, s, lanes, None
        rows = torch.where(s.fresh.unsqueeze(1), fresh, lanes[s.lane])
        x, after = self.model.features(s.tokens, unpack(rows, self.like, past), s.cu_seqlens)
        return x.squeeze(0), s, torch.cat([pack(after), lanes])[s.last], after.memory and after.memory.added

    def advance_without_graph(
        self, segment: int, lanes: Tensor, fresh: Tensor
    ) -> tuple[Tensor | None, Sequences, Tensor]:
        """As `advance`, and keep what the memory grows by."""
        past = None if self.memory is None else self.memory.before(segment)
        x, s, lanes, added = self.advance(segment, lanes, fresh, past)
        if self.memory is not None and added is not None:
            self.memory.store(segment, s.tokens.squeeze(0), added)
        return x, s, lanes

    def loss(self, segment: int, x: Tensor, s: Sequences) -> Tensor:
        """The summed loss of a segment, noted in the metrics."""
        total, losses = token_losses(x, self.model.head.weight, s.targets, self.l2_penalty)
        self.metrics.add(segment, s, losses)
        return total

    def note_border(self, segment: int, *g: Tensor) -> None:
        """Note the gradient (B, D), whole or in parts, that a segment hands to the one before it."""
        self.metrics.add_border(segment, g)

    def divide(self, total: Tensor) -> Tensor:
        """By the normaliser, keeping the dtype."""
        return (total / self.normaliser).to(total.dtype)
