"""A forecast: memory, time, and what would fit, for each strategy and number of ranks, before anything is started.

Memory is `costs.measure`, cut up by `engines`. Times are estimates: multiplications and additions, counted, over the
device's rate in matrix products times an assumed utilisation, and bytes that ranks exchange over the link.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from infctx.costs import Costs, Job, Phases, measure
from infctx.devices import Device
from infctx.engines import STRATEGIES, Cut, computed_in, peak, phases_on

FAR = 4  # how much larger a segment or a window is tried out, to see what grows


@dataclass(frozen=True)
class Run:
    """What a recipe does.

    Args:
        job: a step of one rank. device: that each rank has. time: ranks that share the lanes of a window.
        scan: whether they share each segment, and not the window. accumulate: windows in an optimizer step.
        epoch_tokens: in the prepared data, or None.
    """

    job: Job
    device: Device
    time: int = 1
    scan: bool = False
    accumulate: int = 1
    epoch_tokens: int | None = None


class Row(NamedTuple):
    """A strategy on a number of ranks."""

    cut: Cut
    ranks: int
    phases: Phases
    fits: bool
    step_seconds: float
    epoch_seconds: float | None
    longest: int  # tokens of a segment that fit, with the lanes as they are; 0: none
    lanes: int  # that fit, with the segments as they are

    @property
    def bytes(self) -> int:
        """Of the device, at the peak."""
        _, frame = peak(self.phases)
        return frame.total() - frame["host"]


class Forecast:
    """The costs of a run, measured once for each precision that strategies compute in."""

    def __init__(self, run: Run) -> None:
        self.run, self.found = run, dict[tuple[str, int, int], Costs]()
        self.job = replace(run.job, time=1 if run.scan else run.time)
        if run.scan:
            self.job = replace(self.job, segment_length=-(-run.job.segment_length // run.time))

    def rows(self, ranks: list[int], names: list[str] | None = None) -> list[Row]:
        """All strategies that there are on these numbers of ranks."""
        cuts = [STRATEGIES[name] for name in names or STRATEGIES]
        return [self.row(cut, n) for n in ranks for cut in cuts if (cut.name == "single") == (n == 1)]

    def row(self, cut: Cut, ranks: int) -> Row:
        """One of them."""
        job = self.sized(cut)
        phases = phases_on(cut, ranks, self.costs(job), job)
        steps, tokens = self.step_seconds(cut, ranks), self.job.lanes * self.job.segments * self.run.job.segment_length
        per_step = tokens * self.run.accumulate * ranks / self.run.time
        epoch = None if self.run.epoch_tokens is None else steps * self.run.epoch_tokens / per_step
        row = Row(cut, ranks, phases, False, steps, epoch, self.longest(cut, ranks), self.most_lanes(cut, ranks))
        return row._replace(fits=row.bytes <= self.run.device.usable)

    def sized(self, cut: Cut, times: int = 1, lanes: int = 1) -> Job:
        """A step of this strategy with segments, or lanes, so many times as many."""
        job = self.job
        return replace(
            job, precision=computed_in(cut, job.precision), lanes=job.lanes * lanes,
            segment_length=job.segment_length * times, segments=-(-job.segments // times),
        )  # fmt: skip

    def costs(self, job: Job) -> Costs:
        """Measured, or as measured before."""
        key = (job.precision, job.lanes, job.segment_length)
        if key not in self.found:
            self.found[key] = measure(job)
        return self.found[key]

    def longest(self, cut: Cut, ranks: int) -> int:
        """The largest segment length that fits; at most a whole window."""
        whole, borders = self.job.segment_length * self.job.segments, 4 * self.job.lanes * self.costs(self.job).state

        def bytes_at(length: int) -> int:
            job = replace(self.job, segment_length=length, segments=-(-whole // length))
            kept = 0 if self.job.device == "cuda" and job.states.offload == "cpu" else borders * job.border_rows
            return kept + self._line(cut, ranks, self.sized(cut, FAR), length / self.job.segment_length, ("borders",))

        return _largest(bytes_at, whole, self.run.device.usable, 16)

    def most_lanes(self, cut: Cut, ranks: int) -> int:
        """The largest number of lanes that fit."""
        far = self.sized(cut, lanes=FAR)
        return _largest(
            lambda n: self._line(cut, ranks, far, n / self.job.lanes), 1 << 20, self.run.device.usable, 1
        )  # fmt: skip

    def _line(self, cut: Cut, ranks: int, far: Job, x: float, without: tuple[str, ...] = ()) -> int:
        """Bytes at x times the size, on the line through those at once and FAR times."""
        near = self.sized(cut)
        ends = [phases_on(cut, ranks, self.costs(job), job) for job in (near, far)]
        totals = [{k: _device(v, without) for k, v in phases.items()} for phases in ends]
        return int(max(a + (totals[1][k] - a) * (x - 1) / (FAR - 1) for k, a in totals[0].items()))

    def step_seconds(self, cut: Cut, ranks: int) -> float:
        """An optimizer step: its windows one after another, then what ranks exchange."""
        job, device, costs = self.job, self.run.device, self.costs(self.sized(cut))
        work = job.lanes * job.segments * job.segment_length * self.operations(costs) / job.time
        seconds = work / (device.rate("fp32" if job.precision == "fp32" else "bf16") * device.utilisation)
        e = 4 if job.precision == "fp32" else 2
        share = 2 * (ranks - 1) / ranks / device.link
        sent = 2 * 4 * costs.trained if not cut.weights else 0
        gathered = (job.forwards + 3) * job.segments * e * costs.parameters if cut.weights else 0
        return self.run.accumulate * (seconds + gathered * share) + sent * share

    def operations(self, costs: Costs) -> float:
        """Of a token in a window: three forwards' worth for the gradient, and those that pass 1 makes."""
        forward, head = forward_operations(self.job, costs), 2 * self.job.config.n_embd * self.job.config.vocab_size
        return 3 * forward + self.job.forwards * (forward - head)


def forward_operations(job: Job, costs: Costs) -> float:
    """Of a token in one forward: products with the weights, the recurrence, and GoldFinch's attention."""
    c = job.config
    state = {"rwkv4": 10, "rwkv7": 9 * c.head_size, "rwkv7a": 9 * c.head_size}.get(c.arch, 6 * c.head_size)
    gold = c.n_gold or 0
    work = 2 * costs.multiplied + (c.n_layer - gold) * state * c.n_embd
    past, width = job.segments * job.segment_length / 2, c.n_embd + c.ranks.get("compress", 0)
    return work + gold * past * (4 * c.n_embd + 2 * c.n_embd * width / job.segment_length)


def horizon_cost(job: Job, costs: Costs) -> float:
    """Work of a window over that of the same window with horizon 1."""
    exact, short = (3 + replace(job, horizon=h).forwards for h in (job.horizon, 1))
    forward = forward_operations(job, costs)
    body = 1 - 2 * job.config.n_embd * job.config.vocab_size / forward
    return (3 + body * (exact - 3)) / (3 + body * (short - 3))


def _device(frame: dict[str, int], without: tuple[str, ...]) -> int:
    return sum(size for kind, size in frame.items() if kind not in (*without, "host"))


def _largest(bytes_at: Callable[[int], int], top: int, usable: int, step: int) -> int:
    """The largest multiple of `step` up to `top` whose bytes are usable; `top` itself if all are; 0 if none is."""
    if bytes_at(top) <= usable:
        return top
    low, high = 0, top // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_at(middle * step) <= usable else (low, middle)
    return low * step
