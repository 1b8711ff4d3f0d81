"""What a run folder holds, read for its page: figures of many steps as those of a thousand points."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"  # a line a step; a line a validation
TRAINED = "trained.txt"  # the table of what is trained
STATE_NORMS = "state_norms.jsonl"  # a line a checkpoint
SAMPLES = "samples.json"
PLANNED = "planned.json"
POINTS = 1000  # of a curve

Line = dict[str, Any]
LAST = ("step", "tokens", "documents", "seconds")  # counts of the run so far: of several steps, the last one's
SUMS = ("position_loss", "source_loss")  # [key, summed loss, tokens]
PAIRS = {"border_gradient": 2.0, "group_lr": 1.0}  # [key, value], and the power of which a mean is taken


def lines_of(file: Path) -> Iterator[Line]:
    """Its lines; not a torn last one."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def drop_later(file: Path, step: int) -> None:
    """Take out the lines of later steps, and a torn last one."""
    if file.exists():
        lines = file.read_bytes().splitlines(keepends=True)
        kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= step]
        file.write_bytes(b"".join(kept))


def thinned(file: Path, points: int = POINTS) -> tuple[list[Line], int]:
    """Lines, each the mean of as many steps in a row that there are at most so many; and of how many."""
    if not file.exists():
        return [], 1
    with file.open("rb") as stream:
        count = sum(1 for _ in stream)
    each, lines = max(1, -(-count // points)), lines_of(file)
    return [mean(group) for group in iter(lambda: list(itertools.islice(lines, each)), [])], each


def some(file: Path, points: int = POINTS) -> list[Line]:
    """At most so many of the lines, as far from each other; the last one is among them."""
    lines = list(lines_of(file))
    return lines[:: -max(1, -(-len(lines) // points))][::-1]


def mean(lines: list[Line]) -> Line:
    """One line for several, of the fields that they have: counts are the last ones, the highest memory counts."""
    found: Line = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        values = [line[key] for line in lines if line.get(key) is not None]
        if key in SUMS:
            found[key] = merged(values)
        elif key in PAIRS:
            found[key] = averaged(values, PAIRS[key])
        elif numbers := [x for x in values if isinstance(x, int | float) and math.isfinite(x)]:
            if key in LAST:
                found[key] = numbers[-1]
            else:
                found[key] = max(numbers) if key == "peak_memory_bytes" else sum(numbers) / len(numbers)
    return found


def merged(values: Iterable[list[Any]]) -> list[Any]:
    """[key, sum, tokens] of several steps, summed up by key."""
    sums: dict[Any, list[float]] = {}
    for key, loss, tokens in itertools.chain.from_iterable(values):
        old = sums.setdefault(key, [0.0, 0])
        old[0] += loss
        old[1] += tokens
    return [[key, *x] for key, x in sums.items()]


def averaged(values: list[list[Any]], power: float) -> list[Any]:
    """[key, value] of several steps: the power mean of each key's over all of them; 0 where a step has none."""
    sums: dict[Any, float] = {}
    for key, x in itertools.chain.from_iterable(values):
        sums[key] = sums.get(key, 0.0) + x**power
    return [[key, (x / len(values)) ** (1 / power)] for key, x in sums.items()]


def per_token(sums: list[Any]) -> dict[Any, float]:
    """Loss by key, of what has tokens. Args: sums: [key, summed loss, tokens]."""
    return {key: loss / tokens for key, loss, tokens in sums if tokens}
