"""What the ranks of a wavefront hand each other at the borders between segments, layer by layer.

R ranks in a ring: segment s is run by rank s mod R, and border s is the one before segment s. States cross it onwards,
gradients of states cross it backwards. With them go the compressed keys of GoldFinch, which all later segments read: at
each border those of the R - 1 segments that the next rank has not seen, so that every rank gets each key once; and
backwards the gradients of these keys, summed on the way.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.memory import WindowMemory
from infctx.segments import Window, sequences

# Across a border where gradients are cut states go `beyond`: what is run again behind them overtakes them.
Way = Literal["onwards", "beyond", "backwards"]


def forth(group: range, border: int) -> Way:
    """How states cross a border. Args: group: the segments, connected by gradients, that are on one side of it."""
    return "onwards" if border in group[1:] else "beyond"


class Ring:
    """Messages between neighbours, in the order in which they were sent; once they have met, no sender waits.

    Every rank of the group makes one, at the same place of its program. Each way across a border has communicators of
    its own, and so has the way from the last rank to the first: what waits in one never stands before what another
    rank waits for.

    Args:
        group: the ranks; None: all there are.
        timeout: how long a message is waited for; None: as long as the backend does.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta | None = None) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.ranks = dist.get_process_group_ranks(self.group)
        self.rank, self.size = dist.get_rank(self.group), len(self.ranks)
        self.channels = {
            (way, closing): dist.new_group(self.ranks, timeout, use_local_synchronization=True)
            for way in get_args(Way)
            for closing in (False, True)
            if self.size > 1
        }
        self.met = self.size == 1
        self.sent: dict[tuple[Way, int], tuple[dist.Work, Tensor]] = {}
        self.own: dict[tuple[Way, int], Tensor] = {}  # a rank alone is its own neighbour

    def mine(self, segment: int) -> bool:
        """Whether this rank runs a segment."""
        return segment % self.size == self.rank

    def connect(self, like: Tensor) -> None:
        """Meet the neighbours: NCCL has the first message between two ranks wait until both are there.

        Called by all ranks before they send. Args: like: on the device that messages come from.
        """
        if self.met:
            return
        steps = [(a, a + 1) for a in range(self.size - 1)]
        for (way, closing), channel in self.channels.items():
            pairs = [(self.size - 1, 0)] if closing else steps
            for a, b in pairs if way != "backwards" else [(b, a) for a, b in reversed(pairs)]:
                if self.rank == a:
                    dist.send(like.new_zeros(1), self.ranks[b], group=channel)
                elif self.rank == b:
                    dist.recv(like.new_zeros(1), self.ranks[a], group=channel)
        self.met = True

    def send(self, way: Way, border: int, tag: int, x: Tensor) -> None:
        """Send x across a border; it must not be written to any more."""
        x = x.detach().contiguous()
        if self.size == 1:
            self.own[way, tag] = x
            return
        # The one before it under this tag was taken long ago: its segment comes before this one in any order of work.
        self._settle((way, tag))
        peer, channel = self._channel(way, border, border - 1 if way == "backwards" else border)
        self.sent[way, tag] = dist.isend(x, peer, group=channel, tag=tag), x  # type: ignore[assignment]

    def receive(self, way: Way, border: int, tag: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Wait for what was sent across a border. Raises: RuntimeError if the rank there is gone."""
        if self.size == 1:
            return self.own.pop((way, tag))
        x = like.new_empty(shape)
        peer, channel = self._channel(way, border, border if way == "backwards" else border - 1)
        try:
            dist.recv(x, peer, group=channel, tag=tag)
        except RuntimeError as e:
            raise RuntimeError(f"rank {peer} sent nothing across the border before segment {border}: {e}") from e
        return x

    def share(self, x: Tensor, segment: int) -> Tensor:
        """Give every rank x of the one that runs a segment; called by all of them, with tensors of one shape."""
        if self.size > 1:
            x = x.contiguous()
            dist.broadcast(x, self.ranks[segment % self.size], group=self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, on all of them."""
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.group)
        return x

    def finish(self) -> None:
        """Wait until all that was sent has been taken."""
        for key in list(self.sent):
            self._settle(key)

    def _channel(self, way: Way, border: int, to: int) -> tuple[int, dist.ProcessGroup]:
        return self.ranks[to % self.size], self.channels[way, border % self.size == 0]

    def _settle(self, key: tuple[Way, int]) -> None:
        if key in self.sent:
            work, _ = self.sent.pop(key)
            work.wait()


class KeyRelay:
    """How the keys that a window adds to GoldFinch's memory go round the ring, and their gradients back.

    Args:
        memory: of this rank; it gets the keys of all segments before one that it runs.
        tag: of messages, unlike that of any layer.
    """

    def __init__(self, ring: Ring, window: Window, memory: WindowMemory, tag: int) -> None:
        self.ring, self.window, self.memory, self.tag = ring, window, memory, tag
        self.count = window.tokens.shape[1]
        self.known = 0  # the keys of the segments before this one are here
        self.group = range(self.count)  # the segments between two cuts of the gradient
        self.others: dict[int, Tensor] = {}  # gradients of a segment's keys, summed over ranks that were there before

    def arrive(self, segment: int) -> None:
        """Wait for the keys of the segments before one that is run for the first time."""
        if segment >= self.known:
            crossing = self._crossing(segment)
            self._store(crossing, self._receive(forth(self.group, segment), segment, crossing, self.memory.keys))

    def leave(self, segment: int) -> None:
        """Send on what the next rank has not seen, once the keys of a segment are in the memory for the first time."""
        if segment >= self.known:
            self.known = segment + 1
            if self.known < self.count:
                keys = [self.memory.added(u) for u in self._crossing(self.known)]
                self._send(forth(self.group, self.known), self.known, keys)

    def share(self) -> None:
        """Give every rank all the keys of the window."""
        crossing = self._crossing(self.count)
        if sum(map(self.memory.size, crossing)):
            keys = torch.cat([self.memory.added(u) for u in crossing])
            self._store(crossing, self.ring.share(keys, self.count - 1))

    def gradient(self, segment: int) -> Tensor:
        """The gradient (T, R) that later segments on all ranks gave for the keys that this one added."""
        if segment != self.group[-1]:
            crossing = self._crossing(segment + 1, self.group[0])
            sums = self._receive("backwards", segment + 1, crossing, self.memory.gradient)
            self.others = dict(zip(crossing, self._split(crossing, sums), strict=True))
        return self._sum(segment).to(self.memory.keys.dtype)

    def add(self, segment: int, gradient: Tensor) -> None:
        """Sum up the gradient of what the sequences of a segment remember, and send back what other ranks wait for."""
        self.memory.add(segment, gradient)
        if segment != self.group[0]:
            self._send("backwards", segment, [self._sum(u) for u in self._crossing(segment, self.group[0])])
        self.others = {}

    def _crossing(self, border: int, first: int = 0) -> range:
        """The segments whose keys, or the gradients of these, cross a border: the rank behind it has run the others."""
        return range(max(first, border - self.ring.size + 1), border)

    def _sum(self, segment: int) -> Tensor:
        own = self.memory.sums(segment)
        return own + self.others[segment] if segment in self.others else own

    def _split(self, segments: range, rows: Tensor) -> Sequence[Tensor]:
        return rows.split([self.memory.size(u) for u in segments]) if segments else ()

    def _send(self, way: Way, border: int, parts: list[Tensor]) -> None:
        if sum(map(len, parts)):
            self.ring.send(way, border, self.tag, torch.cat(parts))

    def _receive(self, way: Way, border: int, segments: range, like: Tensor) -> Tensor:
        """Args: like (_, R)."""
        shape = (sum(map(self.memory.size, segments)), like.shape[1])
        return self.ring.receive(way, border, self.tag, shape, like) if shape[0] else like.new_empty(shape)

    def _store(self, segments: range, keys: Tensor) -> None:
        for segment, part in zip(segments, self._split(segments, keys), strict=True):
            self.memory.store(segment, sequences(self.window, segment).tokens.squeeze(0), part)
