"""What the gradient across segments buys: recall of something 2, 4 and 8 segments back, trained four ways.

    python benchmarks/recall.py [--seeds 0 1 2] [--archs rwkv6 rwkv7] [--jobs 1] [--quick] [--out benchmarks/results]

Trained: the exact gradient, the gradient cut at every border of segments (horizon 1) or every second one (horizon 2),
all with the state carried; and zero-state, where every segment begins with a fresh state, as in trainers that carry
none. Same documents, steps and initial weights for all four. A document of distance d has d + 1 segments of 8 tokens:
what is to be recalled is said in the first, what is asked at the end of the last, and the rest is noise.

All weights: a key is given a value, and asked for. State: a model of all weights has learnt four rules (answer = value
+ 0, 1, 2, 3), of which a mark in the first segment says one; then its initial state alone learns one of them from
documents without a mark: the one by which the model answers them least. There are 16 values: guesses are right in 6 %.

`far`: the answers of documents of distance 2, 4 and 8 are learnt. `mixed`: each of these goes with a document of one
segment, whose answer is learnt too. In `far` it is there, unlearnt: both have the same tokens. It stands before or
behind the long one, so that borders where the gradient is cut fall between any two segments.

Accuracy is of greedy answers in documents never trained on, the state carried through them; for zero-state also as
trained, each segment from a fresh state. Finished runs are in recall.json, and are not run again.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import record
import torch
from torch import Tensor

import infctx
from infctx.bptt import window_loss
from infctx.loss import IGNORED
from infctx.optim import OptimizerConfig, make_optimizer, make_schedule
from infctx.parts import Part, freeze
from infctx.segments import Window
from infctx.tuning.config import Tuning
from infctx.tuning.tune import apply_tuning

T, VALUES, KEYS, RULES, NOISE = 8, 16, 8, 4, 16  # tokens in a segment; ids of each kind, in this order
ASK = VALUES + KEYS + RULES  # and the question before the noise
DISTANCES = (2, 4, 8)
TUNED = {"weights": "all weights", "state": "state"}
HORIZONS: dict[str, int | None] = {"exact": None, "horizon 2": 2, "horizon 1": 1, "zero-state": None}
REGIMES = {
    "far": "learnt: answers said 2, 4 and 8 segments back",
    "mixed": "learnt: answers said 2, 4 and 8 segments back, and in the same segment",
}
SIZES = {"n_layer": 2, "n_embd": 32, "vocab_size": ASK + 1 + NOISE, "head_size": 16}
FULL = {"steps": 80, "base_steps": 60, "state_steps": 32, "lanes": 64, "points": 8, "glance": 60, "held_out": 200}
QUICK = {"steps": 2, "base_steps": 2, "state_steps": 2, "lanes": 2, "points": 1, "glance": 4, "held_out": 4}
WEIGHTS = OptimizerConfig(lr=1e-2, warmup_steps=20)
STATE = OptimizerConfig(lr=5e-1, warmup_steps=5)
REMARKS = (
    "Right answers in documents never trained on, by how many segments back what is asked for was said: mean over the",
    "seeds (least-most). A guess among the values is right in 0.06. Of the state, what `horizon 1` has in `far`, where",
    "no gradient reaches the state, is the model's own guess at the rule, before any tuning.",
)


# (generator, documents, distance) -> tokens (n, d + 1, T) and targets of the same shape
Maker = Callable[[torch.Generator, int, int], tuple[Tensor, Tensor]]


def statements(draw: torch.Generator, n: int, distance: int) -> tuple[Tensor, Tensor]:
    """A key with its value somewhere in the first segment; it is asked for at the end of the last."""
    tokens, place = noise(draw, n, distance)
    key, value = (torch.randint(*ids, (n, 1), generator=draw) for ids in ((VALUES, VALUES + KEYS), (0, VALUES)))
    tokens[:, 0].scatter_(1, place, key).scatter_(1, place + 1, value)
    return asked(tokens, key, value)


def rules(draw: torch.Generator, n: int, distance: int, rule: int | None = None) -> tuple[Tensor, Tensor]:
    """The mark of a rule in the first segment, and a value to apply it to in the last; no mark if one is given."""
    tokens, place = noise(draw, n, distance)
    chosen, value = (torch.randint(count, (n, 1), generator=draw) for count in (RULES, VALUES))
    if rule is None:
        tokens[:, 0].scatter_(1, place, VALUES + KEYS + chosen)
    else:
        chosen.fill_(rule)
    return asked(tokens, value, (value + chosen) % VALUES)


def noise(draw: torch.Generator, n: int, distance: int) -> tuple[Tensor, Tensor]:
    """Documents of noise, and a place (n, 1) in the first segment of each, before what a question takes."""
    tokens = torch.randint(ASK + 1, ASK + 1 + NOISE, (n, distance + 1, T), generator=draw)
    return tokens, torch.randint(T - 3, (n, 1), generator=draw)


def asked(tokens: Tensor, thing: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Documents that end with a question, whose answer is their only target."""
    targets = torch.full_like(tokens, IGNORED)
    tokens[:, -1, -2], tokens[:, -1, -1], targets[:, -1, -1] = ASK, thing.squeeze(1), answer.squeeze(1)
    return tokens, targets


def window_of(draw: torch.Generator, make: Maker, lanes: int, mixed: bool, zero_state: bool) -> Window:
    """A short document and a long one in each lane, in either order."""
    distance = DISTANCES[int(torch.randint(len(DISTANCES), (), generator=draw))]
    near, far = make(draw, lanes, 0), make(draw, lanes, distance)
    if not mixed:
        near[1].fill_(IGNORED)
    first = torch.rand(lanes, generator=draw) < 0.5
    tokens, targets = (
        torch.where(first.view(-1, 1, 1), torch.cat([x, y], 1), torch.cat([y, x], 1))
        for x, y in zip(near, far, strict=True)
    )
    start = torch.zeros(tokens.shape, dtype=torch.bool)
    start[:, 0, 0] = True
    start[range(lanes), torch.where(first, 1, distance + 1), 0] = True
    if zero_state:
        start[:, :, 0] = True
    return Window(tokens, targets, start, start.flatten(1).cumsum(1).int().view_as(tokens))


@torch.no_grad()
def accuracy(model: Any, make: Maker, count: int, carried: bool = True) -> dict[str, float]:
    """Share of right answers at each distance; 0 is within a segment."""
    shares = {}
    for distance in (0, *DISTANCES):
        tokens, targets = make(torch.Generator().manual_seed(10**6 + distance), count, distance)
        logits = model(tokens.flatten(1) if carried else tokens.flatten(0, 1))[0].view(*tokens.shape, -1)
        right = logits[..., :VALUES].argmax(-1) == targets
        shares[str(distance)] = float(right[targets != IGNORED].float().mean())
    return shares


def train(
    model: Any, make: Maker, seed: int, config: OptimizerConfig, steps: int, sizes: dict[str, int], condition: str,
    mixed: bool, parts: tuple[Part, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train a model. Returns: its accuracy on the way and at the end, and the seconds that it took."""
    freeze(model, parts)
    optimizer = make_optimizer(model, config, parts)
    schedule = make_schedule(optimizer, config, range(steps + 1))
    draw, begin, curve = torch.Generator().manual_seed(seed), time.perf_counter(), []
    zero_state, every = condition == "zero-state", max(1, steps // sizes["points"])
    for step in range(steps + 1):
        if step % every == 0:
            curve.append({"step": step, **accuracy(model, make, sizes["glance"])})
        if step == steps:
            break
        window = window_of(draw, make, sizes["lanes"], mixed, zero_state)
        window_loss(model, window, None, HORIZONS[condition])[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    figures = {"curve": curve, "final": accuracy(model, make, sizes["held_out"])}
    if zero_state:
        figures["as_trained"] = accuracy(model, make, sizes["held_out"], carried=False)
    return {**figures, "seconds": round(time.perf_counter() - begin, 1)}


class Case(NamedTuple):
    """One run."""

    tuned: str
    regime: str
    arch: str
    condition: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "/".join(map(str, self))


def run(cases: list[Case], sizes: dict[str, int]) -> dict[str, Any]:
    """Train a model for each case; those that tune a state start from the same one, of all weights."""
    runs, tuned, arch, seed = {}, cases[0].tuned, cases[0].arch, cases[0].seed
    start = infctx.init_model(infctx.ModelConfig(arch, **SIZES), seed=seed)
    make, config, steps, learnt = statements, WEIGHTS, sizes["steps"], None
    if tuned == "state":
        learnt = train(start, rules, seed + 100, WEIGHTS, sizes["base_steps"], sizes, "exact", mixed=True)["final"]
        make, config, steps = partial(rules, rule=least_followed(start, sizes)), STATE, sizes["state_steps"]
    for case in cases:
        model = copy.deepcopy(start)
        parts = apply_tuning(model, Tuning()) if tuned == "state" else ()
        runs[case.key] = train(model, make, seed, config, steps, sizes, case.condition, case.regime == "mixed", parts)
        if learnt:
            runs[case.key]["marked_before"] = learnt
    return runs


def least_followed(model: Any, sizes: dict[str, int]) -> int:
    """Of the rules, the one by which a model answers least where none is marked."""
    shares = [mean(accuracy(model, partial(rules, rule=i), sizes["glance"]).values()) for i in range(RULES)]
    return shares.index(min(shares))


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """What one job does: a run, or all that start from one model; the longest jobs come first."""
    found: dict[Any, list[Case]] = {}
    for case in cases:
        found.setdefault(case if case.tuned == "weights" else (case.arch, case.seed), []).append(case)
    return sorted(found.values(), key=len, reverse=True)


def in_processes(jobs: list[list[Case]], sizes: dict[str, int], count: int) -> Iterator[dict[str, Any]]:
    """What `run` gives for each, as it comes, of this process or of several, each of one thread."""
    torch.set_num_threads(1)
    if count == 1:
        yield from (run(job, sizes) for job in jobs)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from (done.result() for done in as_completed([pool.submit(run, job, sizes) for job in jobs]))


def measure(cases: list[Case], sizes: dict[str, int], jobs: int, path: Path) -> dict[str, Any]:
    """Run what the file does not hold yet; it is written after each job."""
    found = json.loads(path.read_text()) if path.exists() else {"sizes": sizes, "runs": {}}
    if found["sizes"] != sizes:
        sys.exit(f"{path}: its runs are of other sizes, {found['sizes']}: choose another --out")
    runs = found["runs"]
    for some in in_processes(groups(case for case in cases if case.key not in runs), sizes, jobs):
        for key, figures in some.items():
            runs[key] = figures
            final = ", ".join(f"{distance}: {share:.2f}" for distance, share in figures["final"].items())
            print(f"{key:34} {figures['seconds']:5.0f} s  {final}", flush=True)
        record.write(path, sizes=sizes, model=SIZES, runs=runs)
    return runs


def table(runs: dict[str, Any], cases: list[Case]) -> list[str]:
    """Final accuracy: mean over the seeds, least and most."""
    lines = [
        "| tuned | learnt | model | trained | within a segment | " + " | ".join(f"{d} back" for d in DISTANCES) + " |"
    ]
    lines.append("|---" * (5 + len(DISTANCES)) + "|")
    for case in dict.fromkeys(case._replace(seed=0) for case in cases):
        found = [runs[x.key] for x in cases if x._replace(seed=0) == case]
        for name, kind in (("", "final"), (", as trained", "as_trained")):
            if kind in found[0]:
                cells = [spread([x[kind][d] for x in found]) for d in found[0][kind]]
                row = [TUNED[case.tuned], case.regime, case.arch, case.condition + name, *cells]
                lines.append(f"| {' | '.join(row)} |")
    return lines


def spread(shares: list[float]) -> str:
    """As a cell has it."""
    return f"{mean(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})"


def plot(runs: dict[str, Any], cases: list[Case], path: Path) -> None:
    """Accuracy by step, from least to most: a column for what is tuned and each model, a row for each distance."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((case.tuned, case.arch) for case in cases))
    figure = Figure(figsize=(3.2 * len(columns), 7.5), layout="constrained")
    axes = figure.subplots(len(DISTANCES), len(columns), sharey=True, sharex="col", squeeze=False)
    for (i, distance), (j, column) in product(enumerate(DISTANCES), enumerate(columns)):
        axis = axes[i][j]
        for (condition, _), style in zip(HORIZONS.items(), ("-", "-.", "--", ":"), strict=True):
            curves = [runs[x.key]["curve"] for x in cases if (x.tuned, x.arch, x.condition) == (*column, condition)]
            steps, shares = [p["step"] for p in curves[0]], [[p[str(distance)] for p in c] for c in curves]
            by_step = list(zip(*shares, strict=True))
            (line,) = axis.plot(steps, [mean(x) for x in by_step], style, label=condition)
            axis.fill_between(
                steps, [min(x) for x in by_step], [max(x) for x in by_step], alpha=0.15, lw=0, color=line.get_color()
            )
        axis.set(
            ylim=(0, 1.02),
            title=f"{column[1]}, {TUNED[column[0]]}, {distance} back",
        )
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    for row in axes:
        row[0].set_ylabel("right answers")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(columns))
    figure.suptitle(REGIMES[cases[0].regime])
    figure.savefig(path)


def main() -> None:
    """Run what is left, print the table, write it with JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--archs", nargs="+", default=["rwkv6", "rwkv7"])
    parser.add_argument("--tuned", nargs="+", default=list(TUNED), choices=TUNED)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: only to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    which = product(options.seeds, options.tuned, options.regimes, options.archs, HORIZONS)
    cases, sizes = [Case(*x, seed) for seed, *x in which], QUICK if options.quick else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    runs = measure(cases, sizes, options.jobs, options.out / "recall.json")
    lines = table(runs, cases)
    print("\n".join(lines))
    record.write_table(options.out / "recall.md", lines, "", *REMARKS)
    for regime in options.regimes:
        plot(runs, [case for case in cases if case.regime == regime], options.out / f"recall-{regime}.svg")


if __name__ == "__main__":
    main()
