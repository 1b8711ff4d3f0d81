"""What a training step keeps in memory: the step itself, run in a `Ledger`; no formula stands for an architecture.

The compiled kernels are asked for their sizes and not called. A window of few segments is run, and what grows with
their number is added. L layers, C channels, B lanes, S segments of T tokens, D numbers in a state.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from infctx.borders import StatesConfig
from infctx.bptt import Gradient, WindowGradient, window_loss
from infctx.config import ModelConfig
from infctx.ledger import Ledger
from infctx.loss import TILE
from infctx.models.gold import TILE as ATTENTION_TILE
from infctx.models.rwkv import RWKV
from infctx.ops.planned import planned_kernels
from infctx.optim import OptimizerConfig, make_optimizer
from infctx.segments import Window
from infctx.state import pack

Phases = dict[str, Counter[str]]
FIXED = ("borders", "window")  # kinds whose growth is known
WINDOW_BYTES = 8 + 8 + 8 + 4 + 1  # of a token: itself, target, position, id, start


@dataclass(frozen=True)
class Job:
    """What the memory of a step depends on.

    Args:
        config: sizes of the model. lanes: B. segment_length: T. segments: S of the longest window.
        horizon, states: as the recipe has them.
        precision: fp32; bf16-mixed: float32 weights under autocast; bf16: weights in bfloat16.
        kernel: backend of the recurrence. device: cuda or cpu. multiprocessors: of the device, 0 for a CPU.
        time: ranks among which the segments of a window are dealt out.
    """

    config: ModelConfig
    lanes: int
    segment_length: int
    segments: int
    horizon: int | None = None
    states: StatesConfig = StatesConfig()  # noqa: RUF009 (frozen)
    precision: str = "fp32"
    kernel: str = "auto"
    device: str = "cpu"
    multiprocessors: int = 0
    time: int = 1

    @property
    def reach(self) -> int:
        """Segments under one gradient."""
        return min(self.horizon or self.segments, self.segments)

    @property
    def border_rows(self) -> int:
        """States of all lanes in memory at a time: those kept, those between two kept ones, the one worked on."""
        length = self.states.block(self.reach, self.time)
        return -(-(-(-self.reach // length) + length) // self.time) + 1

    @property
    def forwards(self) -> float:
        """Segments that pass 1 runs, over all of them: see `bptt.Gradient.window`."""
        done, length = 0, self.states.block(self.reach, self.time)
        for begin in range(0, self.segments, self.reach):
            group = min(self.reach, self.segments - begin)
            blocks = -(-group // length)
            done += (blocks - 1) * length + group - blocks
        return done / self.segments


class Costs(NamedTuple):
    """Bytes by kind at the peak of each phase of a step, and the numbers that they come from."""

    phases: Phases  # window, forward (what of it runs with a graph), backward, step
    parameters: int
    trained: int
    multiplied: int  # of the parameters, those that each token is multiplied with
    largest: int  # of the parameters in one tensor
    layer: int  # of the parameters in the largest layer
    state: int  # D
    tile: int  # logits in memory at a time


def measure(job: Job) -> Costs:
    """The costs of a step. Raises: ValueError as the model and its kernels do."""
    tile = -(-ATTENTION_TILE // job.segment_length)  # segments after which attention's tiles are full
    counts = sorted({min(job.segments, n) for n in ((tile + 2, tile + 5) if job.config.n_gold else (2,))})
    simulated = [_simulate(replace(job, segments=n)) for n in counts]
    first, last = simulated[0], simulated[-1]
    more, rows = job.segments - counts[-1], job.border_rows - replace(job, segments=counts[-1]).border_rows
    phases = {}
    for name, seen in last.phases.items():
        phases[name] = grown = Counter(seen)
        if len(counts) > 1:  # each token leaves a key, and later segments read them all
            before, after = (sum(v for k, v in x.phases[name].items() if k not in FIXED) for x in (first, last))
            grown["activations"] += (after - before) * more // (counts[-1] - counts[0])
        if name in ("window", "forward"):
            grown["borders"] += rows * job.lanes * last.state * 4
        grown["window"] += more * job.lanes * job.segment_length * WINDOW_BYTES
    return last._replace(phases=phases)


def _simulate(job: Job) -> Costs:
    tile = torch.Size((min(TILE, job.lanes * job.segment_length), job.config.vocab_size))
    ledger = Ledger(job.device, tile)
    autocast: AbstractContextManager[Any] = nullcontext()
    if job.precision == "bf16-mixed":
        autocast = torch.autocast("cpu", torch.bfloat16)
    on_gpu = job.device == "cuda" and job.kernel.split("-")[0] in ("auto", "cuda", "fla")
    with planned_kernels(job.device, job.multiprocessors), ledger:
        with ledger.naming("weights"), _default(torch.bfloat16 if job.precision == "bf16" else torch.float32):
            model = RWKV(job.config, "cpu" if on_gpu else job.kernel)
        optimizer = _optimizer(model, ledger, job)
        with ledger.naming("window"):
            window = _window(job)
        with ledger.phase("window"), autocast:
            loss, _, _ = window_loss(model, window, None, job.horizon, 1, states=job.states, runner=_runner(ledger))
        with ledger.phase("backward"):
            optimizer.zero_grad()
            loss.backward()
        with ledger.phase("step"), ledger.naming("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return _numbers(model, ledger.phases, tile.numel())


def _numbers(model: RWKV, phases: Phases, tile: int) -> Costs:
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    trained = sum(p.numel() for p in named.values() if p.requires_grad)
    multiplied = sum(p.numel() for name, p in named.items() if p.squeeze().dim() > 1 and "emb" not in name)
    layer = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    state = pack(model.initial_state(1)).shape[1]
    return Costs(phases, sum(sizes), trained, multiplied, max(sizes), layer, state, tile)


def _runner(ledger: Ledger) -> Any:
    def run(task: Any, *given: Any) -> Any:
        return WindowGradient.apply(partial(_Traced, ledger), task, *given, *task.parameters())

    return run


def _optimizer(model: RWKV, ledger: Ledger, job: Job) -> Optimizer:
    """As after an earlier step: with its moments, and with the gradients that stay until the next backward."""
    optimizer = make_optimizer(model, OptimizerConfig())
    for group in optimizer.param_groups:
        group["foreach"] = True  # here for speed
    with ledger.naming("gradients"):
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
    with ledger.naming("optimizer"):
        optimizer.step()
    for group in optimizer.param_groups:
        group["foreach"] = job.device == "cuda"  # as torch chooses by itself
    return optimizer


def _window(job: Job) -> Window:
    """One document in each lane. Tokens have no contents; where documents begin is read, and has."""
    shape = (job.lanes, job.segments, job.segment_length)
    ids, start = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    start[:, 0, 0] = True
    tokens, targets, position = (torch.empty(shape, dtype=torch.float64).long() for _ in range(3))
    return Window(tokens, targets, start, ids, position)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Traced(Gradient):
    """A window's gradient that says what its tensors are."""

    def __init__(self, ledger: Ledger, *given: Any) -> None:
        super().__init__(*given)
        self.ledger = ledger

    def window(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        with self.ledger.naming("borders"):
            return super().window(lanes)

    def _forward(self, *given: Any) -> Tensor:
        with self.ledger.naming("activations"):
            return super()._forward(*given)

    def _segment(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        with self.ledger.naming("activations"):
            return super()._segment(*given)

    def _add(self, grads: list[Tensor]) -> None:
        self.ledger.rename(grads, "segment gradients")
        with self.ledger.naming("sums"):
            super()._add(grads)
