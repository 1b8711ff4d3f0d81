"""Documents into lanes, lanes into windows, windows into segments: a plan of an epoch.

B lanes on this rank, G lanes in all, S segments in a window, T tokens in a segment.
"""

import heapq
from bisect import bisect_right, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

POOL = 64  # with whole documents: how many a lane the planner looks over for ones that fill a window


class Document(NamedTuple):
    """A document's tokens, and which of them are to be learnt (None: all). A mask belongs to the target token."""

    tokens: np.ndarray  # (n,)
    mask: np.ndarray | None = None  # (n,) bool


class Sources(NamedTuple):
    """Which source each document is of: for all windows of an epoch the same, so that a token takes nothing."""

    of: Tensor  # (documents,) int32
    number: int  # how many sources there are


class Window(NamedTuple):
    """What is trained on at once, on the CPU whatever device trains."""

    tokens: Tensor  # (B, S, T) int64
    targets: Tensor  # (B, S, T) int64, -100 where nothing is to be learnt
    start: Tensor  # (B, S, T) bool, true at the first token of a document
    ids: Tensor  # (B, S, T) int32, which document the token is of; -1: padding
    position: Tensor | None = None  # (B, S, T) int64, the token's place in its document
    normaliser: int | None = None  # supervised tokens of the whole optimizer step: all lanes, all accumulated windows
    sources: Sources | None = None  # of the documents that `ids` are of


class Sequences(NamedTuple):
    """A segment as N sequences end to end, without its padding."""

    tokens: Tensor  # (1, M)
    targets: Tensor  # (M,)
    position: Tensor | None  # (M,)
    cu_seqlens: Tensor  # (N + 1,) int32
    lane: Tensor  # (N,) the lane a sequence is in
    fresh: Tensor  # (N,) bool, whether it begins a document
    last: Tensor  # (B,) the last sequence of each lane; N + b where lane b has no token here
    source: Tensor | None = None  # (M,) int32, the source that the token's document is of

    def to(self, device: torch.device) -> "Sequences":
        """On another device."""
        return Sequences(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]


def sequences(window: Window, segment: int) -> Sequences:
    """Lay a segment's lanes end to end: a sequence begins where a lane does and where a document does.

    On the CPU, where windows are: nothing waits for a device.
    """
    real, start = window.ids[:, segment] >= 0, window.start[:, segment].flatten()
    lanes, length = real.shape
    index = real.flatten().nonzero().squeeze(1)
    lane = index // length
    border = torch.ones(len(index), dtype=torch.bool)
    border[1:] = (lane[1:] != lane[:-1]) | start[index[1:]]
    begin = border.nonzero().squeeze(1)
    n = len(begin)
    cu_seqlens = torch.cat([begin, torch.tensor([len(index)])]).int()
    last = (n + torch.arange(lanes)).scatter_reduce(0, lane[begin], torch.arange(n), "amax", include_self=False)
    tokens, targets = (x[:, segment].flatten()[index] for x in (window.tokens, window.targets))
    position = None if window.position is None else window.position[:, segment].flatten()[index]
    source = None if window.sources is None else window.sources.of[window.ids[:, segment].flatten()[index]]
    return Sequences(tokens.unsqueeze(0), targets, position, cu_seqlens, lane[begin], start[index[begin]], last, source)


class Piece(NamedTuple):
    """Inputs begin to end of a document, at `place` in a lane's row of a window."""

    lane: int
    place: int
    document: int
    begin: int
    end: int


class Plan:
    """Where each token of an epoch goes: a pure function of the arguments, with random access to every window.

    Each lane reads its documents one after another from a line of tokens; window i is the stretch
    borders[i] to borders[i + 1] of every lane's line.

    Args:
        inputs: (documents,) input tokens of each document.
        lanes: G, in all.
        segment_length: T.
        segments_per_window: S, or None: windows hold whole documents and are as long as their longest.
        seed, epoch: of the shuffle.
        chosen: the documents that the epoch reads, some perhaps several times; None: each once.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        lanes: int,
        segment_length: int,
        segments_per_window: int | None,
        seed: int,
        epoch: int,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.inputs, self.segment_length = inputs, segment_length
        if chosen is None:
            chosen = np.arange(len(inputs))
        inputs = inputs[chosen]
        self.tokens = int(inputs.sum())
        random = np.random.default_rng([seed, epoch])
        if segments_per_window is None:
            self.borders, lines = _whole(inputs, lanes, segment_length, random)
        else:
            self.borders, lines = _running(inputs, lanes, segment_length * segments_per_window, segment_length, random)
        self.documents = [chosen[np.array([d for d, _ in line], dtype=np.int64)] for line in lines]
        self.begins = [np.array([b for _, b in line], dtype=np.int64) for line in lines]

    def __len__(self) -> int:
        return len(self.borders) - 1

    def pieces(self, window: int) -> Iterator[Piece]:
        """What a window holds, lane by lane."""
        low, high = self.borders[window], self.borders[window + 1]
        for lane, (documents, begins) in enumerate(zip(self.documents, self.begins, strict=True)):
            first, last = max(0, int(np.searchsorted(begins, low, "right")) - 1), int(np.searchsorted(begins, high))
            for document, begin in zip(documents[first:last].tolist(), begins[first:last].tolist(), strict=True):
                end = min(begin + int(self.inputs[document]), high)
                if end > low:
                    yield Piece(lane, max(begin, low) - low, document, max(low - begin, 0), end - begin)

    @property
    def read(self) -> np.ndarray:
        """(windows + 1,) tokens of all lanes before each border of the windows."""
        borders = np.array(self.borders)
        total = np.zeros_like(borders)
        for documents, begins in zip(self.documents, self.begins, strict=True):
            sizes = self.inputs[documents]
            begun = np.searchsorted(begins, borders)
            held, ends = (np.append(0, x) for x in (sizes.cumsum(), begins + sizes))
            total += held[begun] - np.maximum(ends[begun] - borders, 0)
        return total

    def begun(self, windows: int) -> int:
        """Documents that begin in the first windows, in all lanes."""
        return sum(int(np.searchsorted(begins, self.borders[windows])) for begins in self.begins)

    @property
    def padding(self) -> float:
        """The share of an epoch's places that hold no token."""
        return 1 - self.tokens / (len(self.documents) * self.borders[-1])

    def cut(self, horizon: int | None) -> float:
        """The share of tokens whose gradient ends before the beginning of their document."""
        reach = self.segment_length * horizon if horizon else self.borders[-1]
        cut = 0
        for documents, begins in zip(self.documents, self.begins, strict=True):
            window = np.searchsorted(self.borders, begins, "right") - 1
            border = np.minimum(np.take(self.borders, window + 1), self._next_cut(begins, window, reach))
            cut += int(np.maximum(begins + self.inputs[documents] - border, 0).sum())
        return cut / max(1, self.tokens)

    def _next_cut(self, begins: np.ndarray, window: np.ndarray, reach: int) -> np.ndarray:
        """The first border of the horizon after each place, in its window."""
        low = np.take(self.borders, window)
        return low + ((begins - low) // reach + 1) * reach


Line = list[tuple[int, int]]  # (document, where it begins)


def _running(inputs: np.ndarray, lanes: int, window: int, segment: int, random: Any) -> tuple[list[int], list[Line]]:
    """Longest first to the shortest lane, which keeps them even; then in random order. Windows cut where they end."""
    shuffled = random.permutation(len(inputs))
    held: list[list[int]] = [[] for _ in range(lanes)]
    loads = [(0, lane) for lane in range(lanes)]
    for document in shuffled[np.argsort(-inputs[shuffled], kind="stable")].tolist():
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + int(inputs[document]), lane))
        held[lane].append(document)
    lines = []
    for documents in held:
        order = random.permutation(np.array(documents, dtype=np.int64))
        lines.append(list(zip(order.tolist(), (inputs[order].cumsum() - inputs[order]).tolist(), strict=True)))
    total = -(-max(load for load, _ in loads) // segment) * segment
    return [*range(0, total, window), total], lines


def _whole(inputs: np.ndarray, lanes: int, segment: int, random: Any) -> tuple[list[int], list[Line]]:
    """Windows as long as the longest document of a pool of random ones, each lane filled with the longest that fit."""
    waiting = random.permutation(len(inputs)).tolist()
    pool: list[tuple[int, int]] = []
    windows: list[tuple[int, list[Line]]] = []
    while waiting or pool:
        while waiting and len(pool) < POOL * lanes:
            document = waiting.pop()
            insort(pool, (int(inputs[document]), document))
        length = -(-pool[-1][0] // segment) * segment
        windows.append((length, [_fill(pool, length) for _ in range(lanes)]))
    borders, lines = [0], [[] for _ in range(lanes)]  # type: tuple[list[int], list[Line]]
    for i in random.permutation(len(windows)).tolist():
        length, rows = windows[i]
        for line, row in zip(lines, random.permutation(lanes).tolist(), strict=True):
            line.extend((document, borders[-1] + begin) for document, begin in rows[row])
        borders.append(borders[-1] + length)
    return borders, lines


def _fill(pool: list[tuple[int, int]], length: int) -> Line:
    """Take documents from the sorted pool, the longest that fits first, until none fits."""
    line, used = [], 0
    while (at := bisect_right(pool, (length - used, 2**62))) > 0:
        size, document = pool.pop(at - 1)
        line.append((document, used))
        used += size
    return line
