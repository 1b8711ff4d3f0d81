"""A forecast as text: what is planned, a table, and on request the formulas with the numbers put in."""

from infctx.costs import Costs, Job
from infctx.devices import GIB
from infctx.engines import GRADIENTS, peak
from infctx.plan import Forecast, Row, Run, forward_operations, horizon_cost

COLUMNS = ("weights", "masters", "gradients", "moments", "activations", "logits", "borders", "window", "engine", "host")
_KINDS = {**dict.fromkeys(GRADIENTS, "gradients"), "optimizer": "moments", "other": "activations"}


def heading(forecast: Forecast) -> list[str]:
    """What is planned, on what, and what is assumed."""
    run, job = forecast.run, forecast.run.job
    costs, c, d = forecast.costs(forecast.job), job.config, run.device
    exact = "exact" if job.reach >= job.segments else f"{job.horizon} segments"
    return [
        f"model: {c.arch}, {c.n_layer} layers of {c.n_embd} channels, {costs.parameters:,} parameters, "
        f"{costs.trained:,} of them trained",
        f"window: {job.lanes} lanes x {job.segments:,} segments x {job.segment_length:,} tokens, {job.precision}, "
        f"kernel {job.kernel}{' (planned as cuda)' if job.kernel == 'fla' else ''}; "
        f"{costs.state:,} numbers in a lane's state",
        f"horizon: {exact}: {3 + forecast.job.forwards:.2f} forwards' worth of work, "
        f"{horizon_cost(forecast.job, costs):.2f} times that of horizon 1",
        f"device: {d.name}, {d.memory / GIB:.1f} GiB, of which {d.usable / GIB:.1f} to plan with; "
        f"{d.rate('fp32') / 1e12:.3g} (fp32) and {d.rate('bf16') / 1e12:.3g} (bf16) x 1e12 operations/s; {d.source}",
        f"assumed: {d.utilisation:.0%} of these operations reached, one machine, no time to load data; times are "
        "estimates",
    ]


def table(rows: list[Row]) -> list[str]:
    """A line for each strategy and number of ranks: MiB of a rank at its peak, by kind, and what follows."""
    names = ["strategy", "ranks", *COLUMNS, "peak MiB", "fits", "s/step", "h/epoch", "longest segment", "most lanes"]
    cells = [names] + [_cells(row) for row in rows]
    used = [i for i, name in enumerate(names) if name not in COLUMNS or any(row[i] != "0" for row in cells[1:])]
    width = {i: max(len(row[i]) for row in cells) for i in used}
    return ["  ".join(row[i].ljust(width[i]) if i == 0 else row[i].rjust(width[i]) for i in used) for row in cells]


def _cells(row: Row) -> list[str]:
    _, frame = peak(row.phases)
    sums = dict.fromkeys(COLUMNS, 0)
    for kind, size in frame.items():
        sums[_KINDS.get(kind, kind)] += size
    epoch = "-" if row.epoch_seconds is None else f"{row.epoch_seconds / 3600:.3g}"
    bytes_ = [f"{x / 2**20:.0f}" for x in (*sums.values(), row.bytes)]
    fits = "yes" if row.fits else "no"
    limits = [f"{x:,}" if x else "none" for x in (row.longest, row.lanes)]
    return [row.cut.name, str(row.ranks), *bytes_, fits, f"{row.step_seconds:.3g}", epoch, *limits]


def explain(forecast: Forecast, rows: list[Row]) -> list[str]:
    """The formulas, with numbers."""
    run, job = forecast.run, forecast.job
    costs = forecast.costs(job)
    lines = ["", *_memory(job, costs), *_time(run, job, costs, forecast.operations(costs))]
    for row in rows:
        name, frame = peak(row.phases)
        parts = " + ".join(f"{kind} {size:,}" for kind, size in sorted(frame.items(), key=lambda x: -x[1]) if size)
        lines.append(
            f"{row.cut.name}, {row.ranks} ranks: most in the {_PHASES[name]}: {parts} = {frame.total():,} bytes"
        )
        if row.cut.note and row.ranks > 1:
            lines.append(f"    engine and masters, by formula: {row.cut.note}")
    return lines


_PHASES = {"window": "window", "forward": "window", "backward": "handing over of gradients", "step": "update"}


def _memory(job: Job, costs: Costs) -> list[str]:
    e = 2 if job.precision == "bf16" else 4
    p, q, d = costs.parameters, costs.trained, costs.state
    rows = f"ceil({job.reach} / {job.states.block(job.reach)}) + {job.states.block(job.reach)}"
    keep = f"{rows}, over {job.time} ranks, + 1 = {job.border_rows} rows" if job.time > 1 else f"{rows} + 1 rows"
    return [
        f"weights: e P = {e} x {p:,} = {e * p:,} bytes",
        f"moments: two of e Q = 2 x {e} x {q:,} = {2 * e * q:,} bytes",
        f"gradients: those of the last step, their sums over the segments in float32, those of one segment: up to "
        f"({e} + 4 + {e}) x {q:,} = {(2 * e + 4) * q:,} bytes",
        f"border states: {keep} of 4 B D = 4 x {job.lanes} x {d:,} = {job.border_rows * 4 * job.lanes * d:,} bytes",
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
