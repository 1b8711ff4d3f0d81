"""What a training step keeps in memory: the step itself, run in a `Ledger`; no formula stands for an architecture.

The compiled kernels are asked for their sizes and not called. A window of few segments through few layers is run, and
what grows with their number is added. L layers, C channels, B lanes, S segments of T tokens, D numbers in a state.
"""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from infctx.bptt import Gradient, WindowGradient, window_loss
from infctx.job import Job
from infctx.ledger import Ledger, Made
from infctx.loss import TILE
from infctx.models.gold import TILE as ATTENTION_TILE
from infctx.models.rwkv import RWKV
from infctx.ops.planned import planned_kernels
from infctx.optim import OptimizerConfig, make_optimizer
from infctx.segments import Sources, Window
from infctx.state import pack

Phases = dict[str, Counter[str]]
Places = dict[tuple[str, str], Counter[str]]
LAYERS = (3, 4)  # run, where more are alike
FIXED = ("borders", "window")  # kinds whose growth is known
WINDOW_BYTES = 8 + 8 + 8 + 4 + 1  # of a token: itself, target, position, id, start


class Costs(NamedTuple):
    """Bytes by kind at the peaks of a step, and the numbers that they come from."""

    places: Places  # by phase, and by the place in the model where it is
    parameters: int
    trained: int
    multiplied: int  # of the parameters, those that each token is multiplied with
    largest: int  # of the parameters in one tensor
    layer: int  # of the parameters in the largest layer
    state: int  # D
    tile: int  # logits in memory at a time

    @property
    def phases(self) -> Phases:
        """The peak of each phase: window, forward (what of it runs with a graph), backward, step."""
        tops: Phases = {}
        for (phase, _), frame in self.places.items():
            if phase not in tops or frame.total() > tops[phase].total():
                tops[phase] = frame
        return tops

    def at_peaks(self) -> "Costs":
        """Without the places where no phase has its peak."""
        return self._replace(places={(phase, ""): frame for phase, frame in self.phases.items()})


def along(a: Costs, b: Costs, x: float) -> Costs:
    """Costs where b is at 1 and a at 0, place by place: at one place, they are on a line. The peak's place may move."""
    places = {
        at: Counter(
            {kind: round(frame[kind] + x * (b.places[at][kind] - frame[kind])) for kind in frame | b.places[at]}
        )
        for at, frame in a.places.items()
        if at in b.places
    }
    return Costs(places, *(round(p + x * (q - p)) for p, q in zip(a[1:], b[1:], strict=True)))


class Sample(NamedTuple):
    """Costs of windows of few segments: of as many as `few` says."""

    segments: tuple[int, ...]
    costs: tuple[Costs, ...]


def few(job: Job) -> tuple[int, ...]:
    """How many segments to run: one number, or two if more than `FIXED` grows with them."""
    tiles = -(-ATTENTION_TILE // job.segment_length)  # segments after which attention's tiles are full
    counts = (tiles + 2, tiles + 5) if job.config.n_gold else (2,)
    return tuple(sorted({min(job.segments, n) for n in counts}))


def sample(job: Job, made: Made | None = None) -> Sample:
    """Run windows of few segments.

    Args: made: filled with what operations made, for other samples in the same precision.
    Raises: ValueError as the model and its kernels do.
    """
    known: Made = {} if made is None else made
    return Sample(few(job), tuple(_all_layers(replace(job, segments=n), known) for n in few(job)))


def line(a: Sample, b: Sample, x: float) -> Sample:
    """As `along`."""
    return Sample(a.segments, tuple(along(*pair, x) for pair in zip(a.costs, b.costs, strict=True)))


def measure(job: Job, given: Sample | None = None) -> Costs:
    """The costs of a step. Args: given: what `sample` makes of the job. Raises: ValueError as `sample` does."""
    counts, costs = given or sample(job)
    last, found = costs[-1], costs[-1]
    if len(counts) > 1:  # each token leaves a key, and later segments read them all
        found = along(costs[0], last, (job.segments - counts[0]) / (counts[-1] - counts[0]))
    more, rows = job.segments - counts[-1], job.border_rows - replace(job, segments=counts[-1]).border_rows
    places = {}
    for (phase, place), frame in found.places.items():
        places[phase, place] = grown = Counter(frame)
        for kind in FIXED:
            grown[kind] = last.places[phase, place][kind]
        if phase in ("window", "forward"):
            grown["borders"] += rows * job.lanes * last.state * 4
        grown["window"] += more * job.lanes * job.segment_length * WINDOW_BYTES
    return found._replace(places=places)


def _all_layers(job: Job, made: Made) -> Costs:
    """From few layers, if they are alike but for the first and the last; GoldFinch's, of two kinds, are all run."""
    if not job.alike or job.config.n_layer <= max(LAYERS):
        return _simulate(job, made)
    a, b = (_simulate(replace(job, config=replace(job.config, n_layer=n)), made) for n in LAYERS)
    return along(a, b, (job.config.n_layer - LAYERS[0]) / (LAYERS[1] - LAYERS[0]))


def _simulate(job: Job, made: Made) -> Costs:
    tile = torch.Size((min(TILE, job.lanes * job.segment_length), job.config.vocab_size))
    ledger = Ledger(job.device, tile, made)
    autocast: AbstractContextManager[Any] = nullcontext()
    if job.precision == "bf16-mixed":
        autocast = torch.autocast("cpu", torch.bfloat16)
    on_gpu = job.device == "cuda" and job.kernel.split("-")[0] in ("auto", "cuda", "fla")
    model = job.outline()
    model.kernel = "cpu" if on_gpu else job.kernel
    with planned_kernels(job.device, job.multiprocessors), ledger:
        with ledger.naming("weights"):
            _fill(model, torch.bfloat16 if job.precision == "bf16" else torch.float32)
        _say_places(model, ledger)
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
        return _numbers(model, ledger.frames, tile.numel())


def _say_places(model: RWKV, ledger: Ledger) -> None:
    """Tell the ledger which layer is run, the same for the first two and the last, however many there are."""

    def note(place: str) -> Any:
        def hook(*_: Any) -> None:
            ledger.place = place

        return hook

    def after(place: str, result: Any) -> None:
        ledger.place = "head"
        if result[0].grad_fn is not None:
            result[0].grad_fn.register_prehook(note(f"{place}, backward"))

    for i, block in enumerate(model.blocks):
        place = f"layer {i if i < LAYERS[0] - 1 else i - len(model.blocks)}"
        block.register_forward_pre_hook(note(place))
        block.register_forward_hook(lambda _, __, result, place=place: after(place, result))


def _numbers(model: RWKV, places: Places, tile: int) -> Costs:
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    trained = sum(p.numel() for p in named.values() if p.requires_grad)
    multiplied = sum(p.numel() for name, p in named.items() if p.squeeze().dim() > 1 and "emb" not in name)
    layer = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    state = pack(model.initial_state(1)).shape[1]
    return Costs(places, sum(sizes), trained, multiplied, max(sizes), layer, state, tile)


def _runner(ledger: Ledger) -> Any:
    def run(task: Any, *given: Any) -> Any:
        return WindowGradient.apply(partial(_Traced, ledger), task, *given, *task.parameters())

    return run


def _optimizer(model: RWKV, ledger: Ledger, job: Job) -> Optimizer:
    """As after an earlier step: with its moments, and with the gradients that stay until the next backward."""
    name: Any = job.optimizer.removesuffix("8bit")  # its moments are not of torch: see `plantext.heading`
    optimizer = make_optimizer(model, OptimizerConfig(name))
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
    return Window(tokens, targets, start, ids, position, sources=Sources(torch.zeros(1, dtype=torch.int32), 1))


def _fill(model: RWKV, dtype: torch.dtype) -> None:
    """Storages in place of outlines."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=dtype)


class _Traced(Gradient):
    """A window's gradient that says what its tensors are."""

    def __init__(self, ledger: Ledger, *given: Any) -> None:
        super().__init__(*given)
        self.ledger = ledger

    def window(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        with self.ledger.naming("borders"):
            return super().window(lanes)

    def _forward(self, *given: Any) -> Tensor:
        self.ledger.place = "before a graph"
        with self.ledger.naming("activations"):
            return super()._forward(*given)

    def _segment(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        with self.ledger.naming("activations"):
            return super()._segment(*given)

    def _add(self, grads: list[Tensor]) -> None:
        self.ledger.rename(grads, "segment gradients")
        self.ledger.place = "sums"
        with self.ledger.naming("sums"), torch.no_grad():  # no part of what runs with a graph
            super()._add(grads)
