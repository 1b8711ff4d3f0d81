"""Windows under engines that keep the weights in pieces on many ranks: DeepSpeed's ZeRO-3, and FSDP2.

They put a layer's weights together where the layer is called, and cut its gradient up where a backward leaves it. So
the gradient cannot be taken inside one autograd Function, as `bptt.WindowGradient` takes it: each segment has a
backward of its own, through the engine. That of the segment run last is left to whoever calls backward on the window's
loss, so clipping, accumulation and the optimizer see one loss. All ranks call the engine equally often: where one has
only padding in a segment, it runs one token that counts for nothing.

B lanes, N sequences in a segment, D numbers in a state, all of it in one row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from infctx.bptt import Gradient, Runner
from infctx.loss import IGNORED, token_losses
from infctx.state import BlockState, KeyMemory, State, pack, select, unpack
from infctx.task import Task


class Engine(Protocol):
    """What keeps the weights."""

    @property
    def ranks(self) -> int:
        """By which it divides gradients."""

    def forward(self, part: Callable[..., Any], *args: Any) -> Any:
        """Call a part of a step with the weights within its reach; it gives a tuple of tensors."""

    def backward_segment(self, total: Tensor) -> None:
        """Back-propagate a scalar that `forward` led to, and add up the gradient of the weights."""

    def last(self) -> None:
        """Announce the segment of the window that is run last."""


class Outline:
    """A model whose weights are in pieces, as `window_loss` sees it: its state has the sizes it had with them whole.

    Args:
        model: with its weights whole. device: where it will run.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, like = model, model.initial_state(1)
        blocks = tuple(BlockState(*(x.to(device) for x in block)) for block in like.blocks)
        memory = like.memory and KeyMemory(*(x.to(device) for x in like.memory[:3]))
        self._like = State(blocks, memory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def initial_state(self, n: int) -> State:
        """The state of n sequences before their first token."""
        return select(self._like, torch.zeros(n, dtype=torch.long, device=self._like.blocks[0].att_shift.device))


def runner(engine: Engine) -> Runner:
    """How `window_loss` runs a window under this engine.

    Raises: ValueError when it is run, if the incoming states have a gradient: it would have to leave the window by the
        backward of the segment run last.
    """
    return partial(_run, engine)


def _run(engine: Engine, task: Task, lanes: Tensor, keys: Tensor | None, fresh: Tensor) -> tuple[Tensor, Tensor]:
    gradient = SegmentGradient(engine, task, fresh)
    if not torch.is_grad_enabled():
        return gradient.forward_only(lanes)
    if any(x is not None and x.requires_grad for x in (lanes, keys, fresh)):
        raise ValueError("states that are learnt need whole weights: set trainer.strategy to ddp, zero1 or zero2")
    total, carried = gradient.window(lanes)
    return gradient.joined(total), carried


class SegmentGradient(Gradient):
    """As `Gradient`, with a backward of the engine for each segment; the engine has the sums."""

    def __init__(self, engine: Engine, task: Task, fresh: Tensor) -> None:
        super().__init__(task, fresh.detach(), ())
        self.engine = engine
        count = task.window.tokens.shape[1]
        horizon = min(task.horizon, count)
        self.final = (count - 1) // horizon * horizon  # the first segment of the last group is run last
        self.left: tuple[Any, ...] = ()

    def forward_only(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns: the loss of the window, and the lanes' states after it."""
        total = lanes.new_zeros(())
        for segment in range(self.task.window.tokens.shape[1]):
            if self.task.empty(segment):
                self.engine.forward(self._nothing)
                continue
            loss, lanes = self.engine.forward(self._without_graph, segment, lanes, True)
            total = total + loss
        return self.task.divide(total), lanes

    def joined(self, total: Tensor) -> Tensor:
        """The window's loss, whose backward is that of the segment run last."""
        return _Joined.apply(total, *self.left)

    def _ahead(self, segment: int, lanes: Tensor) -> Tensor:
        if self.task.empty(segment):
            self.engine.forward(self._nothing)
            return lanes
        (lanes,) = self.engine.forward(self._without_graph, segment, lanes, False)
        return lanes

    def _note_border(self, segment: int, g: Tensor) -> None:
        self.task.note_border(segment, g / self.engine.ranks)  # see `_segment`: it has that factor

    @torch.enable_grad()
    def _segment(self, segment: int, before: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, memory, empty = before.detach().requires_grad_(), self.task.memory, self.task.empty(segment)
        past = memory.before(segment) if memory is not None and not empty else None
        if past is not None:
            past.keys.requires_grad_()
        if segment == self.final:
            self.engine.last()
        with self.drawing(segment):
            part = self._nothing if empty else partial(self._with_graph, segment, before, past)
            loss, *results = self.engine.forward(part)
        seeds = [torch.zeros_like(x) for x in results]
        if not empty:
            seeds[0] = g
            if memory is not None:
                seeds[1] = memory.seed(segment)
        self.left = (self.task.divide(torch.ones_like(loss)), seeds, loss, *results)
        if segment != self.final:
            # The engine divides by the ranks; what goes on as the next G is then multiplied by them already.
            self.engine.backward_segment(_Joined.apply(loss.detach(), *self.left) * self.engine.ranks)
            self.left = ()
            if past is not None and memory is not None:
                assert past.keys.grad is not None
                memory.add(segment, past.keys.grad)
        after = before if empty else results[0]
        return loss.detach(), after.detach().clone(), g if before.grad is None else before.grad

    def _with_graph(self, segment: int, before: Tensor, past: KeyMemory | None) -> tuple[Tensor, ...]:
        x, s, after, added = self.task.advance(segment, before, self.fresh, past)
        assert x is not None
        if self.task.memory is None or added is None:
            return self.task.loss(segment, x, s), after
        self.task.memory.store(segment, s.tokens.squeeze(0), added)
        return self.task.loss(segment, x, s), after, added

    def _without_graph(self, segment: int, lanes: Tensor, loss: bool) -> tuple[Tensor, ...]:
        x, s, after = self.task.advance_without_graph(segment, lanes, self.fresh)
        assert x is not None
        return (self.task.loss(segment, x, s), after) if loss else (after,)

    def _nothing(self) -> tuple[Tensor, ...]:
        """A token that nothing is learnt from, after which nothing is carried on.

        Its state has a gradient as that of a true segment has: engines count on the same steps backwards on all ranks.
        """
        task, device = self.task, self.fresh.device
        memory = task.like.memory and KeyMemory(*(x.detach() for x in task.like.memory[:3]))
        if memory is not None:
            memory.keys.requires_grad_()
        state = unpack(self.fresh.detach().requires_grad_(), task.like, memory)
        tokens = torch.zeros(1, 1, dtype=torch.long, device=device)
        borders = torch.tensor([0, 1], dtype=torch.int32, device=device)
        x, after = task.model.features(tokens, state, borders)
        targets = torch.full((1,), IGNORED, device=device)
        loss, _ = token_losses(x.squeeze(0), task.model.head.weight, targets, task.l2_penalty)
        return (loss, pack(after)) if after.memory is None else (loss, pack(after), after.memory.added)


class _Joined(torch.autograd.Function):
    """A value whose backward gives a loss its seed times what comes in, and the other results their seeds as they are.

    What comes in is the factor by which the engine will divide, and those seeds have it in them already.
    """

    @staticmethod
    def forward(ctx, value, seed, seeds, loss, *results):  # type: ignore[no-untyped-def]
        ctx.seed, ctx.seeds = seed, seeds
        return value.clone()

    @staticmethod
    def backward(ctx, factor):  # type: ignore[no-untyped-def]
        return None, None, None, ctx.seed * factor, *ctx.seeds
