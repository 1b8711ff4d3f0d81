"""GoldFinch's memory in a window: one buffer that only grows, and the gradient of what is in it.

B lanes, R compressed channels. Each lane has a region of the buffer: what it carried into the window, then its tokens
in order, so that the positions of a document are always one range.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from infctx.segments import Window, sequences
from infctx.state import KeyMemory


class Span(NamedTuple):
    """A sequence of a segment, as rows of the buffer."""

    past: slice  # its document's positions before the segment
    own: slice  # its own


class WindowMemory:
    """What the sequences of each segment remember, and where gradients of it are summed, in float32 at least.

    Args:
        window: its tokens.
        carried: what the B lanes bring along; its gradient is in `carried_gradient` in the end.
        dtype: the computing precision.
    """

    def __init__(self, window: Window, carried: KeyMemory, dtype: torch.dtype) -> None:
        before = carried.cu_seqlens.diff().tolist()
        added = torch.count_nonzero(window.ids >= 0, (1, 2)).tolist()
        origin = [0]
        for x, y in zip(before, added, strict=True):
            origin.append(origin[-1] + x + y)
        self.carried = [slice(o, o + x) for o, x in zip(origin, before, strict=False)]
        rows, rank = origin[-1], carried.keys.shape[1]
        self.keys = carried.keys.new_empty(rows, rank, dtype=dtype)
        self.tokens = carried.tokens.new_empty(rows)
        self.gradient = torch.zeros_like(self.keys, dtype=torch.promote_types(dtype, torch.float32))
        for part, begin, end in zip(self.carried, carried.cu_seqlens[:-1], carried.cu_seqlens[1:], strict=True):
            self.keys[part], self.tokens[part] = carried.keys[begin:end].to(dtype), carried.tokens[begin:end]
        self.spans, self.documents = self._lay_out(window)

    def _lay_out(self, window: Window) -> tuple[list[list[Span]], list[slice]]:
        """The spans of every segment, and the document in which each lane ends."""
        lanes, spans = list(self.carried), list[list[Span]]()
        for segment in range(window.tokens.shape[1]):
            s = sequences(window, segment)
            spans.append([])
            for n, lane, fresh in zip(s.cu_seqlens.diff().tolist(), s.lane.tolist(), s.fresh.tolist(), strict=True):
                end = lanes[lane].stop
                past = slice(end if fresh else lanes[lane].start, end)
                lanes[lane] = slice(past.start, end + n)
                spans[-1].append(Span(past, slice(end, end + n)))
        return spans, lanes

    def before(self, segment: int) -> KeyMemory:
        """What the sequences of a segment remember."""
        return self._gather([span.past for span in self.spans[segment]])

    def after(self) -> KeyMemory:
        """What the lanes remember at the end of the window."""
        return KeyMemory(*(x.clone() for x in self._gather(self.documents)[:3]))  # the buffer may go

    def store(self, segment: int, tokens: Tensor, added: Tensor) -> None:
        """Keep what a segment added. Args: tokens (T,), added (T, R), in the order of its sequences."""
        for span, new in self._own(segment):
            self.keys[span.own] = added[new].detach()
            self.tokens[span.own] = tokens[new].to(self.tokens)

    def size(self, segment: int) -> int:
        """How many tokens a segment has."""
        return sum(span.own.stop - span.own.start for span in self.spans[segment])

    def added(self, segment: int) -> Tensor:
        """The keys (T, R) that a segment added, in the order of its sequences."""
        return torch.cat([self.keys[:0], *(self.keys[span.own] for span in self.spans[segment])])

    def sums(self, segment: int) -> Tensor:
        """The gradient (T, R) that later segments gave for the keys that this one added, as it is summed."""
        return torch.cat([self.gradient[:0], *(self.gradient[span.own] for span in self.spans[segment])])

    def seed(self, segment: int) -> Tensor:
        """The same in the computing precision."""
        return self.sums(segment).to(self.keys.dtype)

    def add(self, segment: int, gradient: Tensor) -> None:
        """Sum up the gradient of `before(segment)`."""
        begin = 0
        for span in self.spans[segment]:
            end = begin + span.past.stop - span.past.start
            self.gradient[span.past] += gradient[begin:end]
            begin = end

    def cut(self) -> None:
        """Forget the gradient: what comes later reaches back no further."""
        self.gradient.zero_()

    def carried_gradient(self) -> Tensor:
        """(M, R) of what the lanes brought along."""
        return torch.cat([self.gradient[part] for part in self.carried])

    def _gather(self, parts: list[slice]) -> KeyMemory:
        borders = torch.tensor([0] + [part.stop - part.start for part in parts]).cumsum(0).int()
        if len(parts) == 1:  # no copy
            tokens, keys = self.tokens[parts[0]], self.keys[parts[0]].detach()
        else:
            tokens, keys = (torch.cat([x[part] for part in parts] or [x[:0]]) for x in (self.tokens, self.keys))
        return KeyMemory(tokens, keys, borders.to(self.keys.device))

    def _own(self, segment: int) -> list[tuple[Span, slice]]:
        """The sequences of a segment, and where their tokens are among its own."""
        begin, rows = 0, []
        for span in self.spans[segment]:
            end = begin + span.own.stop - span.own.start
            rows.append((span, slice(begin, end)))
            begin = end
        return rows
