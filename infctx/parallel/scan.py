"""The scan schedule: each segment is split over the ranks of a group, which run the same layers in step.

A rank has a stretch of every lane. What a layer makes of it is a map of the state before it to the state after it that
does not depend on that state: S A + C. All ranks exchange their maps, and each one composes those of the ranks before
it to the state that its own tokens begin with, and all of them to the state after the segment. Back-propagation runs
the maps the other way: ranks exchange the gradients that their tokens give for the states that they began with, and
each one composes those of the ranks after it to the gradient of the state that its tokens ended in.

What ranks exchange does not grow with the tokens, and they exchange it in the same order whatever they have: a rank
without a token runs its layers on none. So weights may be sharded over these ranks.

R ranks, B lanes, N sequences in this rank's part of a segment, M tokens in them, C channels, H heads.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.bptt import Runner, run_alone
from infctx.parallel.exchange import MAPS, Handed, Line
from infctx.segments import Sequences, Window, sequences
from infctx.state import KeyMemory, pack, unpack
from infctx.task import Task

Op = Callable[..., tuple[Tensor, Tensor]]


class Scan:
    """Runs windows over the ranks of a group: a `bptt.Runner`.

    All ranks have the same weights and get the same window and the same lanes' states. Each returns its own part of the
    loss and of the metrics, and its own part of the gradients of parameters and of the fresh state: they are to be
    summed over the ranks. The states after the window, and the gradient of those before it, are whole on every rank.

    Args:
        group: the ranks, in the order of their tokens; None: all there are.
        inner: how each rank runs its part; under engines with weights in pieces, `sharded.runner`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, inner: Runner = run_alone) -> None:
        self.line, self.inner = Line(group), inner

    def __call__(self, task: Task, lanes: Tensor, keys: Tensor | None, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Run a window. Raises: ValueError for a model whose attention needs the keys of all tokens."""
        if task.memory is not None:
            raise ValueError(
                "parallel.schedule scan: GoldFinch's attention needs all keys of a document; choose wavefront"
            )
        if self.line.rank and not task.carried:
            lanes = lanes.detach()  # its gradient, whole on every rank, goes to the fresh state: once is enough
        return self.inner(Part.of(task, self.line), lanes, keys, fresh)


class Part(Task):
    """A task of this rank: its own tokens of every segment."""

    line: Line

    @classmethod
    def of(cls, task: Task, line: Line) -> "Part":
        """The part of the rank's place in the line. Args: task: of the whole window."""
        length = task.window.tokens.shape[2]
        own = slice(length * line.rank // line.size, length * (line.rank + 1) // line.size)
        whole = task.window
        tokens, targets, start, ids = (x[:, :, own] for x in whole[:4])
        position = None if whole.position is None else whole.position[:, :, own]
        part = cls(*task._replace(window=Window(tokens, targets, start, ids, position, *whole[5:])))
        part.line = line
        return part

    def empty(self, segment: int) -> bool:
        """Never: ranks run in step, with or without tokens."""
        return False

    def note_border(self, segment: int, *g: Tensor) -> None:
        """Once: it is whole on every rank, and metrics are summed over them."""
        if self.line.rank == 0:
            super().note_border(segment, *g)

    def advance(
        self, segment: int, lanes: Tensor, fresh: Tensor, past: KeyMemory | None
    ) -> tuple[Tensor | None, Sequences, Tensor, Tensor | None]:
        """As `Task.advance`; the lanes' states are those after all ranks' tokens."""
        on_host = sequences(self.window, segment)
        s = on_host.to(lanes.device)
        split = SplitSegment(self.line, s, on_host)
        rows = torch.cat([fresh.expand(len(s.lane), -1), lanes])
        x, after = self.model.features(s.tokens, unpack(rows, self.like), split.cu_seqlens, split)
        return x.squeeze(0), s, pack(after)[len(s.lane) :], None


class SplitSegment:
    """What goes between ranks inside the layers of a segment: a `layers.Split`.

    The model is given N + B sequences: the last ones have no tokens, and are the lanes. Their states come in as they
    are before the segment and go out as they are after it.

    Args:
        s: this rank's sequences.
        on_host: the same on the CPU.
    """

    def __init__(self, line: Line, s: Sequences, on_host: Sequences) -> None:
        self.line, self.own, self.last = line, len(s.lane), s.last
        self.cu_seqlens = torch.cat([s.cu_seqlens, s.cu_seqlens[-1:].expand(len(s.last))])
        self.lane, self.joins = s.lane, ~s.fresh
        self.empty = s.last >= self.own  # (B,) lanes without a token here
        self.open = torch.cat([self.joins, torch.ones_like(self.empty)])  # (N + B,) what does not begin afresh
        self.begun = ~self.open[s.last]  # (B,) lanes in which a document begins: nothing passes
        borders = on_host.cu_seqlens.tolist()
        self.joined = [
            (lane, slice(borders[i], borders[i + 1]))
            for i, (lane, fresh) in enumerate(zip(on_host.lane.tolist(), on_host.fresh.tolist(), strict=True))
            if not fresh
        ]

    def preceding(self, x: Tensor, carried: Tensor) -> Tensor:
        """The last token of the nearest rank before that has one in the lane; of lanes, that of the last such rank."""
        lanes, none = carried[self.own :], self.empty.unsqueeze(1)
        if x.shape[1]:
            ends = self.cu_seqlens[1:].long()[self.last] - 1
            rows = x.squeeze(0)[ends.clamp(min=0)].to(lanes.dtype)
        else:
            rows = x.sum(1).to(lanes.dtype).expand_as(lanes)  # of nothing: backward needs the way to x
        before, after = Handed.apply(self.line, lanes, none.to(lanes.dtype), torch.where(none, 0.0, rows))
        return self._begin(carried, before, after)

    def recurrence(self, op: Op, inputs: tuple[Tensor, ...], state: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """As `layers.Shared.recurrence`, over all ranks' tokens."""

        def run(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
            return op(*inputs, state, self.cu_seqlens, kernel)

        kind, lanes = MAPS[op.__name__], state[self.own :]
        with torch.no_grad():
            a, reads = kind.transition(run, inputs, state, self.cu_seqlens.diff())
            _, c = run(inputs, torch.where(_like(self.open, state), kind.nothing(state), state))
            a = torch.where(_like(self.begun, a), kind.lost, a[self.last])
            states, a = self.line.forth(kind, lanes.detach(), a, c[self.last])
        begin = self._begin(state, states[self.line.rank], states[-1])
        y, last = run(inputs, begin)
        if not torch.is_grad_enabled():
            return y, last
        with torch.no_grad():
            reads = kind.reading(run, inputs, begin, reads)
            scale = kind.rescale(last[self.last], states[self.line.rank + 1])
        return Passed.apply(self, kind, y, last, lanes, a, reads, scale)

    def _begin(self, rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The states that sequences begin with; those of lanes are what they end with."""
        own = torch.where(_like(self.joins, rows), before[self.lane], rows[: self.own])
        return torch.cat([own, after])


class Passed(torch.autograd.Function):
    """y and the last states as they are; their gradients go on to the ranks that they came from.

    Here and not where states came in: the op's backward is to run once, with what all later tokens give.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, split, kind, y, last, lanes, a, reads, scale
    ):
        ctx.split, ctx.kind = split, kind
        ctx.save_for_backward(y, a, reads, scale)
        return y.view_as(y), last.view_as(last)

    @staticmethod
    def backward(ctx, dy, dlast):  # type: ignore[no-untyped-def]
        (y, a, reads, scale), split, kind = ctx.saved_tensors, ctx.split, ctx.kind
        own, g = dlast[: split.own], dlast[split.own :]
        e = torch.zeros_like(g)
        with torch.autocast(g.device.type, enabled=False):
            for lane, tokens in split.joined:
                e[lane] = kind.read_gradient(*(x[0, tokens].to(g.dtype) for x in (dy, y, reads)))
        first, after = split.line.back(kind, g, e, a)
        after = torch.where(_like(split.empty, after), 0.0, after * scale)
        dlast = torch.cat([own, torch.zeros_like(g)]).index_add(0, split.last, after)
        return None, None, dy, dlast, first, None, None, None


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), with the axes of x."""
    return rows.view(-1, *[1] * (x.dim() - 1))
