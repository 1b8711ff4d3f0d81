"""A segment of a wavefront on its way through the layers: states come and go one layer at a time.

B lanes, L layers, D numbers in a state, D_l in that of layer l, R compressed channels, M tokens in a segment.
"""

from functools import partial

import torch
from torch import Tensor

from infctx.parallel.ring import KeyRelay, Ring, Way, forth
from infctx.segments import sequences
from infctx.state import BlockState, KeyMemory, State, pack, unpack
from infctx.task import Task


class Wave:
    """What the segments of a window have in common on this rank."""

    def __init__(self, ring: Ring, task: Task, fresh: Tensor) -> None:
        self.ring, self.task, self.count = ring, task, task.window.tokens.shape[1]
        self.layers = [State((block,)) for block in task.like.blocks]
        self.widths = [pack(state).shape[1] for state in self.layers]
        self.fresh = [x.detach() for x in fresh.split(self.widths, 1)]  # L times (1, D_l)
        self.group = range(self.count)  # the segments between two cuts of the gradient
        self.keys, self.attention = None, -1
        if task.memory is not None:
            self.keys = KeyRelay(ring, task.window, task.memory, len(self.layers))
            # The layers that read the memory have no recurrence; the first of them waits for the keys of others.
            self.attention = next(i for i, block in enumerate(task.like.blocks) if not block.wkv.numel())

    def begin(self, group: range) -> None:
        """Go on to the next segments whose gradients are connected."""
        self.group = group
        if self.keys is not None:
            self.keys.group = group

    def states(self, segment: int, layer: int) -> Tensor:
        """A layer's states (B, D_l) before a segment, from the rank of the one before."""
        return self._receive(forth(self.group, segment), segment, layer)

    def hand_on(self, segment: int, layer: int, lanes: Tensor) -> None:
        """Send a layer's states (B, D_l) after a segment to the rank of the one after."""
        self.ring.send(forth(self.group, segment + 1), segment + 1, layer, lanes)

    def gradient(self, segment: int, layer: int) -> Tensor:
        """The gradient (B, D_l) of a layer's states after a segment, from the rank of the one after."""
        if segment == self.group[-1]:
            return self.fresh[layer].new_zeros(self._shape(layer))
        return self._receive("backwards", segment + 1, layer)

    def hand_back(self, segment: int, layer: int, g: Tensor) -> None:
        """Send the gradient (B, D_l) of a layer's states before a segment to where they came from."""
        if segment != self.group[0]:
            self.ring.send("backwards", segment, layer, g)

    def pass_back(self, segment: int) -> list[Tensor]:
        """Back-propagation of a segment without a token. Returns: the gradients (B, D_l) of all layers' states."""
        gradients = []
        for layer in reversed(range(len(self.layers))):
            gradients.append(self.gradient(segment, layer))
            self.hand_back(segment, layer, gradients[-1])
            if self.keys is not None and layer == self.attention:
                self.keys.add(segment, self.keys.gradient(segment))
        return gradients[::-1]

    def finish(self, lanes: Tensor) -> Tensor:
        """Give every rank the lanes' states after the window, and the keys. Args: lanes (B, D): right on one rank."""
        lanes = self.ring.share(lanes.clone(), self.count - 1)
        if self.keys is not None:
            self.keys.share()
        self.ring.finish()
        return lanes

    def _shape(self, layer: int) -> tuple[int, int]:
        return len(self.task.window.tokens), self.widths[layer]

    def _receive(self, way: Way, border: int, layer: int) -> Tensor:
        return self.ring.receive(way, border, layer, self._shape(layer), self.fresh[layer].detach())


class Passage:
    """A segment on its way through the layers: a `state.Relay`.

    Args:
        given: the lanes' states (B, D) before it; None: the rank of the segment before sends them.
        onwards: whether the rank of the segment after waits for those after it.
    """

    def __init__(self, wave: Wave, segment: int, given: Tensor | None, onwards: bool) -> None:
        self.wave, self.segment, self.onwards = wave, segment, onwards
        self.given = None if given is None else given.split(wave.widths, 1)
        self.s = sequences(wave.task.window, segment).to(wave.fresh[0].device)
        self.came: list[Tensor] = []  # (B, D_l) of each layer
        self.left: list[Tensor] = []

    def run(self) -> Tensor | None:
        """Returns: features (M, C); None if the segment has no token, and what came goes on."""
        task = self.wave.task
        if self.s.tokens.numel():
            x, _ = task.model.features(self.s.tokens, task.like, self.s.cu_seqlens, relay=self)
            return x.squeeze(0)
        for layer in range(len(self.wave.layers)):
            if self.wave.keys is not None and layer == self.wave.attention:
                self.wave.keys.arrive(self.segment)
                self.wave.keys.leave(self.segment)
            self.came.append(self.arrive(layer))
            self.leave(layer, self.came[-1])
        return None

    def before(self, layer: int) -> BlockState:
        """See `Relay`."""
        lanes = self.arrive(layer)
        self.came.append(lanes)
        rows = torch.where(self.s.fresh.unsqueeze(1), self.wave.fresh[layer], lanes[self.s.lane])
        return unpack(rows, self.wave.layers[layer]).blocks[0]

    def after(self, layer: int, state: BlockState) -> None:
        """See `Relay`."""
        self.leave(layer, torch.cat([pack(State((state,))), self.came[layer]])[self.s.last])

    def remembered(self) -> KeyMemory:
        """See `Relay`."""
        assert self.wave.keys is not None
        self.wave.keys.arrive(self.segment)
        return self.wave.keys.memory.before(self.segment)

    def remember(self, memory: KeyMemory) -> None:
        """See `Relay`."""
        assert self.wave.keys is not None and memory.added is not None
        self.wave.keys.memory.store(self.segment, self.s.tokens.squeeze(0), memory.added)
        self.wave.keys.leave(self.segment)

    def arrive(self, layer: int) -> Tensor:
        """The lanes' states (B, D_l) of a layer before the segment."""
        return self.wave.states(self.segment, layer) if self.given is None else self.given[layer]

    def leave(self, layer: int, lanes: Tensor) -> None:
        """Take those after it."""
        self.left.append(lanes.detach())
        if self.onwards:
            self.wave.hand_on(self.segment, layer, lanes)


class Tracked(Passage):
    """A segment with a graph: back-propagation waits for a gradient where states left, and sends one where they came.

    Nodes of a graph run in the reverse order of their making, as far as they can: a layer's gradient is waited for
    after the layer above is done with, and sent before the layer below begins.
    """

    def __init__(self, wave: Wave, segment: int, given: Tensor | None, onwards: bool) -> None:
        super().__init__(wave, segment, given, onwards)
        self.ends: list[Tensor] = []  # scalars whose gradient nobody reads: asking for it is what matters
        self.past: list[Tensor] = []  # at most one: the keys (_, R) that were remembered

    def arrive(self, layer: int) -> Tensor:
        leaf = super().arrive(layer).detach().requires_grad_()
        leaf.register_hook(partial(self.wave.hand_back, self.segment, layer))
        return leaf

    def leave(self, layer: int, lanes: Tensor) -> None:
        super().leave(layer, lanes)
        self.ends.append(Left.apply(lanes, partial(self.wave.gradient, self.segment, layer)))

    def remembered(self) -> KeyMemory:
        memory = super().remembered()
        self.past.append(memory.keys.requires_grad_())
        memory.keys.register_hook(partial(self.wave.keys.add, self.segment))  # type: ignore[union-attr]
        return memory

    def remember(self, memory: KeyMemory) -> None:
        super().remember(memory)
        self.ends.append(Left.apply(memory.added, partial(self.wave.keys.gradient, self.segment)))  # type: ignore[union-attr]


class Left(torch.autograd.Function):
    """A zero in the place of what went away; its gradient is asked for when it is needed, and not before."""

    @staticmethod
    def forward(ctx, x, gradient):  # type: ignore[no-untyped-def]
        ctx.gradient = gradient
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        return ctx.gradient(), None
