"""The training step: the gradient of a window of any length in the memory of one segment, exact or truncated.

Pass 1 runs the segments without a graph and keeps the state at each border, or at some of them. Pass 2 goes from the
last segment to the first: it runs a segment again, with a graph, and back-propagates its loss and the gradient G that
the next segment gave for the state between them; what arrives at the incoming state is the next G. Summed parameter
gradients are handed over in one ordinary backward, so whatever drives the optimizer sees one loss with one gradient.

B lanes, S segments, N sequences in a segment, D numbers in a state, all of it in one row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from infctx.borders import Borders, StatesConfig
from infctx.loss import IGNORED
from infctx.memory import WindowMemory
from infctx.segments import Window
from infctx.state import State, computing_dtype, pack, select, unpack
from infctx.task import Metrics, Task

# (task, the lanes' states, keys they remember, the fresh state) -> the loss, and the lanes' states after the window.
Runner = Callable[[Task, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
ALL_STATES = StatesConfig()


def window_loss(
    model: Any,
    window: Window,
    state: State | None,
    horizon: int | None = None,
    normaliser: Tensor | int | None = None,
    *,
    l2_penalty: float = 0.0,
    states: StatesConfig = ALL_STATES,
    runner: Runner | None = None,
) -> tuple[Tensor, dict[str, Tensor], State]:
    """Loss of a window and its gradient with respect to the parameters, `state` and the model's initial state.

    Args:
        model: has `features`, `head` and `initial_state`, as `models.rwkv.RWKV` has.
        window: the tokens of B lanes, on the CPU.
        state: what the previous window left in the lanes (B rows); None: the model's initial state.
        horizon: segments the gradient reaches back: it is cut at the borders horizon, 2 horizon, ... of the window;
            None: at none of them.
        normaliser: what the summed loss is divided by; None: the window's own number of supervised tokens.
        l2_penalty: see `loss.token_losses`.
        states: which states at borders are kept, and where.
        runner: how the window is run; None: on this rank alone.
    Returns:
        the loss, a scalar (exactly 0 with no supervised token); metrics, detached: `loss_sum` and `tokens`
        (supervised), `segment_loss` (S,) summed losses, `position_loss` and `position_tokens` by power-of-two bucket of
        the position, `source_loss` and `source_tokens` by source of the document (of as many as the window names),
        `border_gradient` (S,) the squared norm of the loss's gradient that segment s hands, through all lanes' states,
        to the one before it (0: nothing, as at the window's beginning); and the state after the window, detached.
    Raises: ValueError if horizon is less than 1.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1 segment or null (the whole window), got {horizon}")
    like = model.initial_state(1)
    fresh = pack(like)
    lanes = pack(state) if state is not None else fresh.expand(len(window.tokens), -1)
    if len(lanes) != len(window.tokens):
        raise ValueError(f"state holds {len(lanes)} sequences, the window has {len(window.tokens)} lanes")
    if normaliser is None:
        normaliser = torch.count_nonzero(window.targets != IGNORED).clamp(min=1)
    carried = state.memory if state is not None else None
    if carried is None and like.memory is not None:
        carried = select(like, torch.zeros(len(lanes), dtype=torch.long, device=lanes.device)).memory
    memory = None if carried is None else WindowMemory(window, carried, computing_dtype(carried.keys))
    horizon = horizon or window.tokens.shape[1]
    metrics = Metrics.zeros(window, lanes.device)
    task = Task(model, window, like, horizon, normaliser, l2_penalty, metrics, memory, states, state is not None)
    loss, lanes = (runner or run_alone)(task, lanes, carried and carried.keys, fresh)
    return loss, metrics._asdict(), unpack(lanes, like, None if memory is None else memory.after())


def run_alone(task: Task, lanes: Tensor, keys: Tensor | None, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Run a window on this rank: see `Runner`."""
    if not torch.is_grad_enabled():
        return _forward_only(task, lanes, fresh)
    return WindowGradient.apply(Gradient, task, lanes, keys, fresh, *task.parameters())


def _forward_only(task: Task, lanes: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    total = lanes.new_zeros(())
    for segment in range(task.window.tokens.shape[1]):
        x, s, lanes = task.advance_without_graph(segment, lanes, fresh)
        if x is not None:
            total = total + task.loss(segment, x, s)
    return task.divide(total), lanes


class WindowGradient(torch.autograd.Function):
    """The whole of forward and backward, done in forward; backward hands the gradients over."""

    @staticmethod
    def forward(ctx, kind, task, lanes, keys, fresh, *parameters):  # type: ignore[no-untyped-def]
        gradient = kind(task, fresh.detach(), parameters)
        loss, carried = gradient.window(lanes.detach())
        ctx.grads = gradient.result()
        ctx.mark_non_differentiable(carried)
        return loss, carried

    @staticmethod
    def backward(ctx, dloss, _):  # type: ignore[no-untyped-def]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("a window's gradient can be taken once: call window_loss again")
        torch._foreach_mul_([g for g in grads if g is not None], dloss)
        return None, None, *grads


class Gradient:
    """Sums of gradients over the segments of one window: of the lanes' states, the fresh state and the parameters."""

    def __init__(self, task: Task, fresh: Tensor, parameters: tuple[nn.Parameter, ...]) -> None:
        self.task, self.fresh, self.parameters = task, fresh.requires_grad_(), parameters
        self.sums: list[Tensor] | None = None
        self.lanes: Tensor | None = None
        self.keys: Tensor | None = None
        self.seed = int(torch.randint(2**62, ()))

    def window(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns: the loss, and the lanes' states after the window."""
        count, total = self.task.window.tokens.shape[1], lanes.new_zeros(())
        horizon = min(self.task.horizon, count)
        length = self.task.states.block(horizon)
        kept, borders = (Borders(n, lanes, self.task.states) for n in (-(-horizon // length), length))
        for begin in range(0, count, horizon):
            group = range(begin, min(begin + horizon, count))
            blocks = [group[i : i + length] for i in range(0, len(group), length)]
            for i, block in enumerate(blocks):
                kept[i] = lanes
                lanes = self._forward(block, lanes) if block[-1] != group[-1] else lanes
            g = torch.zeros_like(lanes)
            for i, block in reversed(list(enumerate(blocks))):
                borders[len(block) - 1] = self._forward(block[:-1], kept[i], borders)
                for segment in reversed(block):
                    loss, after, g = self._segment(segment, borders[segment - block[0]], g)
                    lanes = after if segment == group[-1] else lanes
                    total = total + loss
                    if segment != begin:
                        self._note_border(segment, g)
            if begin == 0:
                self.lanes = g
            if self.task.memory is not None:
                self.keys = self.task.memory.carried_gradient() if begin == 0 else self.keys
                self.task.memory.cut()
        return self.task.divide(total), lanes

    def result(self) -> tuple[Tensor | None, ...]:
        """Gradients of the lanes' states and memory, the fresh state and each parameter; zeros, never None."""
        fresh, *sums = self.sums or [torch.zeros_like(p) for p in (self.fresh, *self.parameters)]
        return self.lanes, self.keys, fresh, *(g.to(p.dtype) for g, p in zip(sums, self.parameters, strict=True))

    def _forward(self, segments: range, lanes: Tensor, borders: Borders | None = None) -> Tensor:
        """Pass 1: the lanes' states after the segments; `borders` gets the one before each."""
        with torch.no_grad():
            for i, segment in enumerate(segments):
                if borders is not None:
                    borders[i] = lanes
                with self.drawing(segment):
                    lanes = self._ahead(segment, lanes)
        torch.clear_autocast_cache()  # casts made without a graph: pass 2 would silently learn nothing from them
        return lanes

    def _note_border(self, segment: int, g: Tensor) -> None:
        self.task.note_border(segment, g)

    def _ahead(self, segment: int, lanes: Tensor) -> Tensor:
        return self.task.advance_without_graph(segment, lanes, self.fresh)[2]

    @torch.enable_grad()
    def _segment(self, segment: int, before: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 2: the loss of a segment, the lanes' states after it, and the gradient of those before it."""
        before, memory = before.detach().requires_grad_(), self.task.memory
        past = memory.before(segment) if memory is not None else None
        sources = [before, self.fresh, *self.parameters]
        if past is not None:
            sources.append(past.keys.requires_grad_())
        with self.drawing(segment):
            x, s, after, added = self.task.advance(segment, before, self.fresh, past)
        if x is None:
            return g.new_zeros(()), before.detach().clone(), g  # not a view: the borders' buffer may go
        loss = self.task.loss(segment, x, s)
        results, seeds = [loss, after], [self.task.divide(torch.ones_like(loss)), g]
        if memory is not None and added is not None:
            memory.store(segment, s.tokens.squeeze(0), added)
            results.append(added)
            seeds.append(memory.seed(segment))
        g, *grads = torch.autograd.grad(results, sources, seeds, allow_unused=True, materialize_grads=True)
        if memory is not None:
            memory.add(segment, grads.pop())
        self._add(grads)
        return loss.detach(), after.detach(), g

    @contextmanager
    def drawing(self, segment: int) -> Iterator[None]:
        """Both passes of a segment draw the same dropout masks, at the cost of one number a window."""
        device = self.fresh.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + segment)
            yield

    def _add(self, grads: list[Tensor]) -> None:
        if self.sums is None:
            # Copied: two inputs may be given one tensor. Widened: a sum of hundreds of bfloat16 terms stands still.
            self.sums = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in grads]
        else:
            torch._foreach_add_(self.sums, [x.to(y.dtype) for x, y in zip(grads, self.sums, strict=True)])
