"""A forecast: memory, time, and what would fit, for each strategy and number of ranks, before anything is started.

Memory is `costs.measure`, cut up by `engines`. Times are estimates: multiplications and additions, counted, over the
device's rate in matrix products times an assumed utilisation, and bytes that ranks exchange over the link.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from infctx.costs import Costs, Phases, Sample, few, line, measure, sample
from infctx.devices import Device
from infctx.engines import STRATEGIES, Cut, computed_in, device_bytes, phases_on
from infctx.job import Job
from infctx.ledger import Made
from infctx.loss import TILE

FAR = 4  # how much larger the largest size is that is run whatever a recipe's is, to see what others need
FINE = 8  # sizes in an octave that are looked at
MOST_LANES = 1 << 10  # that are looked at
MANY = 1000  # segments: more than are run


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

    def refuses(self, cut: Cut) -> bool:
        """Whether `fit` refuses a strategy: where weights must be whole, and where updates must be."""
        tuning = self.job.tuning
        whole_weights = (self.time > 1 and not self.scan) or (tuning is not None and tuning.learns_state)
        return (cut.weights and whole_weights) or (cut.name not in ("single", "ddp") and self.job.optimizer != "adamw")

    @property
    def share(self) -> int:
        """Ranks among which each segment is split."""
        return self.time if self.scan else 1


class Row(NamedTuple):
    """A strategy on a number of ranks."""

    cut: Cut
    ranks: int
    phases: Phases
    fits: bool
    step_seconds: float
    tokens_per_second: float  # of all ranks
    epoch_seconds: float | None
    longest: int  # tokens of a segment that fit, with the lanes as they are; 0: none
    lanes: int  # that fit, with the segments as they are

    @property
    def bytes(self) -> int:
        """Of the device, at the peak."""
        return device_bytes(self.phases)


class Forecast:
    """The costs of a run, measured once for each precision that strategies compute in and each size.

    Attributes: own: what one rank does in a step: the run's job, with its share of each segment.
    """

    def __init__(self, run: Run) -> None:
        length = -(-run.job.segment_length // run.share)
        self.run, self.own = run, replace(run.job, segment_length=length, time=run.time // run.share)
        self.far = 2 if run.job.config.n_gold else FAR  # attention over many tiles takes long to run
        self.samples = dict[tuple[object, ...], Sample]()
        self.made = dict[str, Made]()
        self.guessed = dict[tuple[object, ...], Costs]()

    def rows(self, ranks: list[int], names: list[str] | None = None) -> list[Row]:
        """All strategies that there are on these numbers of ranks."""
        cuts = [STRATEGIES[name] for name in names or STRATEGIES]
        cuts = [cut for cut in cuts if not self.run.refuses(cut)]
        return [self.row(cut, n) for n in ranks for cut in cuts if (cut.name == "single") == (n == 1)]

    def row(self, cut: Cut, ranks: int) -> Row:
        """One of them."""
        run, job = self.run, self.computed(cut)
        phases, seconds = phases_on(cut, ranks, self.costs(job), job), self.step_seconds(cut, ranks)
        fits = device_bytes(phases) <= run.device.usable
        longest, lanes = self.longest(cut, ranks), self.most_lanes(cut, ranks)
        if fits:  # the sizes that were looked at may jump over the recipe's
            longest, lanes = max(longest, run.job.segment_length), max(lanes, job.lanes)
        tokens = self.tokens_of(ranks)
        epoch = None if run.epoch_tokens is None else seconds * run.epoch_tokens / tokens
        return Row(cut, ranks, phases, fits, seconds, tokens / seconds, epoch, longest, lanes)

    def brief(self, cut: Cut, ranks: int) -> tuple[int, float]:
        """Bytes of a rank's device at the peak, and tokens a second of all ranks: without the sizes that would fit."""
        job = self.computed(cut)
        phases = phases_on(cut, ranks, self.costs(job), job)
        return device_bytes(phases), self.tokens_of(ranks) / self.step_seconds(cut, ranks)

    def tokens_of(self, ranks: int) -> float:
        """Places of an optimizer step, on all ranks."""
        job = self.run.job
        return job.lanes * job.segments * job.segment_length * self.run.accumulate * ranks / self.run.time

    def computed(self, cut: Cut) -> Job:
        """A rank's job in the precision that a strategy computes in."""
        return replace(self.own, precision=computed_in(cut, self.own.precision))

    def costs(self, job: Job) -> Costs:
        """Measured, or as measured before."""
        return measure(job, self.sample(job))

    def sample(self, job: Job) -> Sample:
        """Windows of few segments, run once. Args: job: the rank's own, in a precision and of a size."""
        key = (job.precision, job.lanes, job.segment_length, few(job))
        if key not in self.samples:
            self.samples[key] = sample(job, self.made.setdefault(job.precision, {}))
        return self.samples[key]

    def longest(self, cut: Cut, ranks: int) -> int:
        """The largest segment length that fits; at most a whole window. The same for all lengths that a recipe has."""
        job, whole = self.computed(cut), self.own.segment_length * self.own.segments
        known = (TILE // 2, TILE, self.far * TILE)

        def sized(length: int) -> Job:
            return replace(job, segment_length=length, segments=-(-whole // length))

        return self._largest(cut, ranks, sized, [whole, *sizes_below(whole)], known) * self.run.share

    def most_lanes(self, cut: Cut, ranks: int) -> int:
        """The largest number of lanes that fit."""
        job = self.computed(cut)
        full = -(-TILE // job.segment_length)  # lanes that fill a tile of logits
        run = sorted({1, full, self.far * full})
        return self._largest(cut, ranks, lambda n: replace(job, lanes=n), sizes_below(MOST_LANES + 1, 1), tuple(run))

    def _largest(
        self, cut: Cut, ranks: int, sized: Callable[[int], Job], sizes: list[int], known: tuple[int, ...]
    ) -> int:
        """The first of the sizes whose bytes are usable: as guessed from those that are known, then as measured.

        GoldFinch's beyond those are not run: its attention goes over all positions, tile by tile.
        """

        def fits(costs: Costs, job: Job) -> bool:
            return device_bytes(phases_on(cut, ranks, costs, job)) <= self.run.device.usable

        for n in sizes:
            job = sized(n)
            run = not job.config.n_gold or n <= known[-1]
            if fits(self._guess(sized, n, known), job) and (not run or fits(self.costs(job), job)):
                return n
        return 0

    def _guess(self, sized: Callable[[int], Job], n: int, known: tuple[int, ...]) -> Costs:
        """Costs on the line through the samples of the known sizes around n, or the next ones."""
        job = sized(n)
        key = (job.precision, job.lanes, job.segment_length, job.segments)
        if key not in self.guessed:
            i = min(max(bisect_right(known, n), 1), len(known) - 1)
            below, above = (self.sample(replace(sized(k), segments=MANY)) for k in known[i - 1 : i + 1])
            x = (n - known[i - 1]) / (known[i] - known[i - 1])
            self.guessed[key] = measure(job, line(below, above, x)).at_peaks()
        return self.guessed[key]

    def step_seconds(self, cut: Cut, ranks: int) -> float:
        """An optimizer step: its windows one after another, then what ranks exchange."""
        job, device, costs = self.own, self.run.device, self.costs(self.computed(cut))
        work = job.lanes * job.segments * job.segment_length * self.operations(costs) / job.time
        seconds = work / (device.rate("fp32" if job.precision == "fp32" else "bf16") * device.utilisation)
        e = 4 if job.precision == "fp32" else 2
        share = 2 * (ranks - 1) / ranks / device.link
        sent = 2 * 4 * costs.trained if not cut.weights else 0
        gathered = (job.forwards + 3) * job.segments * e * costs.parameters if cut.weights else 0
        return self.run.accumulate * (seconds + gathered * share) + sent * share

    def operations(self, costs: Costs) -> float:
        """Of a token in a window: three forwards' worth for the gradient, and those that pass 1 makes."""
        forward, head = forward_operations(self.own, costs), 2 * self.own.config.n_embd * self.own.config.vocab_size
        return 3 * forward + self.own.forwards * (forward - head)


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


def sizes_below(top: int, least: int = 16) -> list[int]:
    """From large to small, multiples of the least one, and no nearer to each other than FINE in an octave."""
    found, n = list[int](), least
    while n < top:
        found.append(n)
        n += max(least, (1 << n.bit_length() - 1) // FINE)
    return found[::-1]
