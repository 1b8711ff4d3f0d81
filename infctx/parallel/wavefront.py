"""The wavefront schedule: the segments of a window go to the ranks of a group in turn, segment s to rank s mod R.

A rank runs layer l of its segment as soon as the rank of the segment before has run layer l of that: the states of a
layer go on while the later layers still run, so that the ranks work on R segments at a time, each a layer behind the
one before. Backwards it is the same: the gradient of a layer's incoming states goes to the rank of the segment before
as soon as it is there, and is waited for just before the layer is back-propagated; what a rank runs again meanwhile
comes from a state that it kept. The order of the work on one rank is that of `bptt.Gradient`, and every message was
sent earlier in that order than it is waited for: no rank waits for ever.

All numbers that a segment gives are those of one rank, to the bit; only sums over segments are made in another order.

R ranks, B lanes, L layers, D numbers in a state, D_l in that of layer l, N sequences in a segment, M tokens in them.
"""

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infctx.borders import Borders
from infctx.bptt import Gradient, WindowGradient
from infctx.parallel.relay import Passage, Tracked, Wave
from infctx.parallel.ring import Ring
from infctx.task import Task


class Wavefront:
    """Runs windows over the ranks of a group: a `bptt.Runner`.

    All ranks of the group have the same weights, get the same window and the same lanes' states, and call this at the
    same places of their programs. Whole on every rank are the states after the window, what GoldFinch remembers, and
    the gradient of a state that was given. Parts, to be summed over the ranks, are the loss and the metrics (a rank
    counts its own segments), and the gradients of the parameters and of the fresh state, also where the lanes begin
    with it: an engine that averages gradients over W ranks needs the loss times W.

    A rank keeps the states at the borders before its own segments only. With `states.keep: every-N` N grows to a number
    that shares no divisor with R: the kept states are then on all ranks.

    Args:
        group: the ranks, in the order of their segments; None: all there are.
        timeout: how long a message is waited for; None: as long as the backend does.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta | None = None) -> None:
        self.ring = Ring(group, timeout)

    def __call__(self, task: Task, lanes: Tensor, keys: Tensor | None, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Run a window: see `bptt.Runner`."""
        self.ring.connect(lanes)
        if not torch.is_grad_enabled():
            return self._forward_only(task, lanes, fresh)
        wanted = task.carried and lanes.requires_grad, keys is not None and keys.requires_grad
        kind = partial(WaveGradient, self.ring, wanted)
        return WindowGradient.apply(kind, task, lanes, keys, fresh, *task.parameters())

    def _forward_only(self, task: Task, lanes: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        wave, after, total = Wave(self.ring, task, fresh), lanes, lanes.new_zeros(())
        for segment in filter(self.ring.mine, range(wave.count)):
            passage = Passage(wave, segment, None if segment else lanes, onwards=segment + 1 < wave.count)
            x = passage.run()
            if x is not None:
                total = total + task.loss(segment, x, passage.s)
            if segment == wave.count - 1:
                after = torch.cat(passage.left, 1)
        return task.divide(total), wave.finish(after)


class Kept:
    """Lanes' states (B, D) before some segments, in one piece of memory, each until it is dropped."""

    def __init__(self, rows: Borders, count: int) -> None:
        self.rows, self.free = rows, list(range(count))
        self.places: dict[int, int] = {}

    def put(self, segment: int, lanes: Tensor) -> None:
        """Keep the states before a segment."""
        self.places[segment] = self.free.pop()
        self.rows[self.places[segment]] = lanes

    def get(self, segment: int) -> Tensor | None:
        """Them, or None if they are not here."""
        return self.rows[self.places[segment]] if segment in self.places else None

    def drop(self, segment: int) -> None:
        """Their place is free again."""
        if segment in self.places:
            self.free.append(self.places.pop(segment))


class WaveGradient(Gradient):
    """The gradient of a window, of which this rank runs its own segments.

    Args:
        wanted: whether the gradients of the lanes' states, and of the keys they remember, are wanted whole.
    """

    def __init__(
        self, ring: Ring, wanted: tuple[bool, bool], task: Task, fresh: Tensor, parameters: tuple[nn.Parameter, ...]
    ) -> None:
        super().__init__(task, fresh, parameters)
        self.ring, self.wanted, self.wave = ring, wanted, Wave(ring, task, fresh)
        self.seed = int(ring.share(torch.tensor(self.seed, device=fresh.device), 0))
        for x in self.wave.fresh:
            x.requires_grad_()

    def window(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns: this rank's part of the loss, and the lanes' states after the window."""
        self.before, self.after, total = lanes, lanes, lanes.new_zeros(())
        self.lanes, memory = torch.zeros_like(lanes), self.task.memory
        horizon = min(self.task.horizon, self.wave.count)
        length = self.task.states.block(horizon, self.ring.size)
        room = self._room(horizon, length)
        self.kept = Kept(Borders(room, lanes, self.task.states), room)
        for begin in range(0, self.wave.count, horizon):
            group = range(begin, min(begin + horizon, self.wave.count))
            self.wave.begin(group)
            blocks = [group[i : i + length] for i in range(0, len(group), length)]
            for block in blocks[:-1]:
                self._run(block, block[:1])
            for block in reversed(blocks):
                self._run(block[:-1], block)
                for segment in filter(self.ring.mine, reversed(block)):
                    total = total + self._back_propagate(segment)
            if memory is not None:
                self.keys = memory.carried_gradient() if begin == 0 else self.keys
                memory.cut()
        after = self.wave.finish(self.after)
        self._share_gradients()
        return self.task.divide(total), after

    def _room(self, horizon: int, length: int) -> int:
        """How many borders are kept at a time, all before segments of this rank: of a block, and the first ones."""
        begins = range(0, self.wave.count, horizon)
        groups = (range(begin, min(begin + horizon, self.wave.count)) for begin in begins)
        return -(-length // self.ring.size) + max(sum(map(self.ring.mine, group[::length][:-1])) for group in groups)

    def _known(self, segment: int) -> Tensor | None:
        return self.kept.get(segment) if segment else self.before

    def _run(self, segments: range, keep: range) -> None:
        """Pass 1 of this rank's segments: states go on, and those before the segments in `keep` are kept."""
        with torch.no_grad():
            for segment in filter(self.ring.mine, segments):
                given = self._known(segment)
                passage = Passage(self.wave, segment, given, onwards=True)
                with self.drawing(segment):
                    passage.run()
                if given is None and segment in keep:
                    self.kept.put(segment, torch.cat(passage.came, 1))
        torch.clear_autocast_cache()  # as in `Gradient`

    @torch.enable_grad()
    def _back_propagate(self, segment: int) -> Tensor:
        """Pass 2 of a segment: its loss."""
        wave, task = self.wave, self.task
        last = segment == wave.group[-1]
        passage = Tracked(wave, segment, self._known(segment), onwards=last and segment + 1 < wave.count)
        with self.drawing(segment):
            x = passage.run()
        if segment == wave.count - 1:
            self.after = torch.cat(passage.left, 1)
        if x is None:
            loss, g = self.before.new_zeros(()), wave.pass_back(segment)
        else:
            loss = task.loss(segment, x, passage.s)
            g = self._gradients(loss, passage)
        if segment == 0:
            self.lanes = torch.cat(g, 1)
        elif segment != wave.group[0]:
            task.note_border(segment, *g)
        self.kept.drop(segment)
        return loss.detach()

    def _gradients(self, loss: Tensor, passage: Tracked) -> list[Tensor]:
        """Sum up those of the fresh state and the parameters. Returns: those (B, D_l) of the states before."""
        sources = [*passage.came, *self.wave.fresh, *self.parameters, *passage.past]
        seeds = [self.task.divide(torch.ones_like(loss)), *map(torch.zeros_like, passage.ends)]
        grads = torch.autograd.grad([loss, *passage.ends], sources, seeds, allow_unused=True, materialize_grads=True)
        layers, parameters = len(passage.came), len(self.parameters)
        self._add([torch.cat(grads[layers : 2 * layers], 1), *grads[2 * layers : 2 * layers + parameters]])
        return list(grads[:layers])

    def _share_gradients(self) -> None:
        lanes, keys = self.wanted
        if lanes and self.lanes is not None:
            self.lanes = self.ring.share(self.lanes, 0)
        if keys and self.keys is not None:
            self.keys = self.ring.sum(self.keys)
