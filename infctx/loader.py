"""The windows of an epoch, by its plan, from documents on disk. B lanes on this rank, S segments of T tokens."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from infctx.loss import IGNORED
from infctx.segments import Plan, Sources, Window


class Documents(Protocol):
    """Documents on disk, by number: n tokens make n - 1 inputs."""

    inputs: np.ndarray  # (documents,) int64, input tokens of each
    supervised: np.ndarray  # (documents,) int64, targets to be learnt of each

    def tokens(self, document: int, begin: int, end: int) -> np.ndarray:
        """Tokens begin to end of a document."""

    def mask(self, document: int, begin: int, end: int) -> np.ndarray:
        """Which of them are to be learnt."""


class WindowLoader:
    """The windows of one epoch on one rank; stops and goes on anywhere.

    Args:
        documents: where tokens come from.
        plan: the plan of an epoch, by its number.
        lanes: the lanes of this rank, of G in all.
        accumulate: windows in an optimizer step.
        epoch: its number.
        limit: of windows in an epoch, or None.
        identity: what must be the same for a position to mean the same: refused otherwise.
        sources: of the documents, where losses by source are wanted.
    """

    def __init__(
        self, documents: Documents, plan: Callable[[int], Plan], lanes: range, accumulate: int, epoch: int,
        identity: dict[str, Any], limit: int | None = None, sources: Sources | None = None,
    ) -> None:  # fmt: skip
        self.sources = sources
        self.documents, self.plan_of, self.lanes, self.accumulate = documents, plan, lanes, accumulate
        self.epoch, self.position, self.identity = epoch, 0, identity
        self._first, self.limit = 0, limit
        self._group: tuple[int, int] | None = None  # the last group of accumulated windows, and its normaliser
        self.plan = plan(epoch)

    def __len__(self) -> int:
        return len(self.plan) if self.limit is None else min(self.limit, len(self.plan))

    def __iter__(self) -> Iterator[Window]:
        first, self._first = self._first, 0  # a restored position holds for one pass; the next one is whole
        for i in range(first, len(self)):
            self.position = i + 1
            yield self.window(i)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in a few numbers."""
        return {"epoch": self.epoch, "position": self.position, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises: ValueError if the data, the lanes or the cuts are not the same."""
        for key, value in self.identity.items():
            if state.get(key) != value:
                was, now = (str(x)[:16] for x in (state.get(key), value))
                raise ValueError(
                    f"{key} was {was} in the checkpoint and is {now} now: the run cannot go on with the same documents "
                    "in the same order: give what it had, or begin anew by model.load"
                )
        self.epoch, self.position, self._first = state["epoch"], state["position"], state["position"]
        self.plan = self.plan_of(self.epoch)

    def window(self, i: int) -> Window:
        """Window i of the epoch."""
        shape = (len(self.lanes), self.plan.borders[i + 1] - self.plan.borders[i])
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        start, ids, position = np.zeros(shape, bool), np.full(shape, -1, np.int32), np.zeros(shape, np.int64)
        for lane, place, document, begin, end in self.plan.pieces(i):
            if lane not in self.lanes:
                continue
            here = (lane - self.lanes.start, slice(place, place + end - begin))
            piece = self.documents.tokens(document, begin, end + 1)
            tokens[here], targets[here] = piece[:-1], piece[1:]
            if self.documents.supervised[document] < self.documents.inputs[document]:
                targets[here][~self.documents.mask(document, begin + 1, end + 1)] = IGNORED
            start[here[0], place] = begin == 0
            ids[here], position[here] = document, np.arange(begin, end)
        fold = (len(self.lanes), -1, self.plan.segment_length)
        folded = [torch.from_numpy(x).view(fold) for x in (tokens, targets, start, ids, position)]
        return Window(folded[0], folded[1], folded[2], folded[3], folded[4], self.normaliser(i), self.sources)

    def normaliser(self, i: int) -> int:
        """Supervised tokens of the optimizer step that window i belongs to, over all ranks."""
        first = i - i % self.accumulate
        if self._group is None or self._group[0] != first:
            group = range(first, min(first + self.accumulate, len(self)))
            self._group = (first, max(1, sum(self._supervised(j) for j in group)))
        return self._group[1]

    def _supervised(self, i: int) -> int:
        total, d = 0, self.documents
        for _, _, document, begin, end in self.plan.pieces(i):
            whole = end - begin == d.inputs[document]
            if whole or d.supervised[document] == d.inputs[document]:
                total += int(d.supervised[document]) if whole else end - begin
            else:
                total += int(d.mask(document, begin + 1, end + 1).sum())
        return total
