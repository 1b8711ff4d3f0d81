"""A forecast as text: what is planned, a table, and on request the formulas with the numbers put in."""

from infctx.costs import Costs
from infctx.devices import GIB
from infctx.engines import GRADIENTS, STRATEGIES, peak
from infctx.job import Job
from infctx.plan import MOST_LANES, Forecast, Row, Run, forward_operations, horizon_cost

COLUMNS = ("weights", "masters", "gradients", "moments", "activations", "logits", "borders", "window", "engine", "host")
_KINDS = {**dict.fromkeys(GRADIENTS, "gradients"), "optimizer": "moments", "other": "activations"}


def heading(forecast: Forecast) -> list[str]:
    """What is planned, on what, and what is assumed."""
    run, job = forecast.run, forecast.run.job
    costs, c, d = forecast.costs(forecast.own), job.config, run.device
    exact = "exact" if job.reach >= job.segments else count(job.reach, "segment")
    apart = [name for name, cut in STRATEGIES.items() if run.refuses(cut)]
    return [
        f"model: {c.arch}, {c.n_layer} layers of {c.n_embd} channels, {costs.parameters:,} parameters, "
        f"{costs.trained:,} of them trained",
        f"window: {count(job.lanes, 'lane')} x {count(job.segments, 'segment')} x "
        f"{count(job.segment_length, 'token')}, {job.precision}, "
        f"kernel {job.kernel}{' (planned as cuda)' if job.kernel == 'fla' else ''}; "
        f"{costs.state:,} numbers in a lane's state",
        f"horizon: {exact}: {3 + forecast.own.forwards:.2f} forwards' worth of work, "
        f"{horizon_cost(forecast.own, costs):.2f} times that of horizon 1",
        f"device: {d.name}, {d.memory / GIB:.1f} GiB, of which {d.usable / GIB:.1f} to plan with; "
        f"{d.rate('fp32') / 1e12:.3g} (fp32) and {d.rate('bf16') / 1e12:.3g} (bf16) x 1e12 operations/s; {d.source}",
        f"assumed: {d.utilisation:.0%} of these operations reached, one machine, no time to load data; times are "
        "estimates",
        *(
            ["moments: planned in float32; adamw8bit needs about 6 bytes less of each parameter"]
            if job.optimizer == "adamw8bit"
            else []
        ),
        *([f"left out: {', '.join(apart)}: fit refuses them with this recipe"] if apart else []),
    ]


def table(rows: list[Row], length: int) -> list[str]:
    """A line for each strategy and number of ranks: MiB of a rank at its peak, by kind, and what follows from it.

    Args: length: tokens of a segment, as the recipe has it.
    """
    names = ["strategy", "ranks", *COLUMNS, "peak MiB", "fits", "s/step", "tokens/s", "h/epoch", "longest segment",
             "most lanes"]  # fmt: skip
    cells = [names] + [_cells(row, length) for row in rows]
    empty = dict.fromkeys(COLUMNS, "0") | {"h/epoch": "-"}
    used = [i for i, name in enumerate(names) if any(row[i] != empty.get(name) for row in cells[1:])]
    width = {i: max(len(row[i]) for row in cells) for i in used}
    lines = ["  ".join(row[i].ljust(width[i]) if i == 0 else row[i].rjust(width[i]) for i in used) for row in cells]
    if any(_only_longer(row, length) for row in rows):
        lines += ["", f"fits longer: not with segments of {length:,} tokens, whose border states are too many, but "
                  "with longer ones: the longest is in the table"]  # fmt: skip
    if not any(row.fits for row in rows):
        lines += ["", "nothing fits as it is: take more ranks, zero3 or an -offload strategy, shorter segments "
                  "(data.segment_length), or states.keep every-16 or states.offload cpu"]  # fmt: skip
    return lines


def _only_longer(row: Row, length: int) -> bool:
    return not row.fits and row.longest > length


def _cells(row: Row, length: int) -> list[str]:
    _, frame = peak(row.phases)
    sums = dict.fromkeys(COLUMNS, 0)
    for kind, size in frame.items():
        sums[_KINDS.get(kind, kind)] += size
    epoch = "-" if row.epoch_seconds is None else f"{row.epoch_seconds / 3600:.3g}"
    bytes_ = [f"{x / 2**20:.0f}" for x in (*sums.values(), row.bytes)]
    fits = "yes" if row.fits else "longer" if _only_longer(row, length) else "no"
    limits = [f"{x:,}" if x else "none" for x in (row.longest, row.lanes)]
    limits[1] += " or more" if row.lanes >= MOST_LANES else ""
    times = [f"{row.step_seconds:.3g}", f"{row.tokens_per_second:,.0f}", epoch]
    return [row.cut.name, str(row.ranks), *bytes_, fits, *times, *limits]


def count(n: int, what: str) -> str:
    """1 rank, 2 ranks."""
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def explain(forecast: Forecast, rows: list[Row]) -> list[str]:
    """The formulas, with numbers."""
    run, job = forecast.run, forecast.own
    costs = forecast.costs(job)
    lines = ["", *_memory(job, costs), *_time(run, job, costs, forecast.operations(costs))]
    for row in rows:
        name, frame = peak(row.phases)
        parts = " + ".join(f"{kind} {size:,}" for kind, size in sorted(frame.items(), key=lambda x: -x[1]) if size)
        most = f"most in the {_PHASES[name]}: {parts} = {frame.total():,} bytes"
        lines.append(f"{row.cut.name}, {count(row.ranks, 'rank')}: {most}")
    notes = {row.cut.name: row.cut.note for row in rows if row.cut.note and row.ranks > 1}
    return lines + [f"{name}: engine and masters, by formula: {note}" for name, note in notes.items()]


_PHASES = {"window": "window", "forward": "window", "backward": "handing over of gradients", "step": "update"}


def _memory(job: Job, costs: Costs) -> list[str]:
    e = 2 if job.precision == "bf16" else 4
    p, q, d = costs.parameters, costs.trained, costs.state
    rows = f"ceil({job.reach} / {job.states.block(job.reach)}) + {job.states.block(job.reach)}"
    keep = f"{rows}, over {job.time} ranks, + 1" if job.time > 1 else f"{rows} + 1"
    return [
        f"weights: e P = {e} x {p:,} = {e * p:,} bytes",
        f"moments: two of e Q = 2 x {e} x {q:,} = {2 * e * q:,} bytes",
        f"gradients: those of the last step, their sums over the segments in float32, those of one segment: up to "
        f"({e} + 4 + {e}) x {q:,} = {(2 * e + 4) * q:,} bytes",
        f"border states: {keep} = {job.border_rows:,} rows of 4 B D: {job.border_rows:,} x 4 x {job.lanes} x {d:,} = "
        f"{job.border_rows * 4 * job.lanes * d:,} bytes; at the peak one more or less: that being worked on",
        f"logits: a tile of {costs.tile:,} in float32 = {4 * costs.tile:,} bytes, some copies of it at a time",
        "activations: every tensor that one segment makes, counted by running it on tensors without contents",
        f"window: 29 bytes of a token: {job.lanes} x {job.segments:,} x {job.segment_length:,} of them, on the host",
    ]


def _time(run: Run, job: Job, costs: Costs, operations: float) -> list[str]:
    device, forward = run.device, forward_operations(job, costs)
    rate = device.rate("fp32" if job.precision == "fp32" else "bf16") * device.utilisation
    return [
        f"one forward: 2 x {costs.multiplied:,} weights + recurrence = {forward:,.0f} operations a token",
        f"a window: 3 forwards' worth + {job.forwards:.2f} without head = {operations:,.0f} operations a token, "
        f"at {rate / 1e12:.3g}e12 a second: {rate / operations:,.0f} tokens a second and rank",
    ]
