"""The table in recipes/README.md, from the headers and the keys of the recipes.

    python benchmarks/recipes.py [--plan] [--only book chat]

With --plan, the commands that the headers name plan their memory anew first, with a new model of the published size in
the place of weights to load.
"""

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infctx.sizes import sized

ROOT = Path(__file__).parents[1]
FIELDS = ("Needs", "Cut", "Memory", "Measured")  # of a header, after what the recipe does
NAMES = {"rwkv4": "RWKV-4", "rwkv5": "RWKV-5", "rwkv6": "RWKV-6", "rwkv7": "RWKV-7", "goldfinch": "GoldFinch"}
PLANNED = r"([\d.?]+) GiB on each device \(([\w-]+), (\d+) ranks?\)(?:, [^:]*)?: (infctx plan .+)"
HEAD = """# Recipes

One for each kind of work: copy the nearest one and change its paths. The header of each says what it needs, what of the
gradient is cut, how its memory was planned, and what was measured. `strategy/` has what many devices need, to be given
as a second `-c`.

| recipe | model | what for | trained | read at once | memory, GiB |
|---|---|---|---|---|---|
"""
TAIL = """
*read at once*: lanes x tokens of a segment, and the segments of a window; *document*: windows of whole documents.
*memory*: of each device, as `infctx plan` says it, with the longest documents that the header names. Made by
`python benchmarks/recipes.py`.
"""


class Recipe(NamedTuple):
    """A file of recipes/: its header by field, `does` first, and its keys."""

    file: Path
    header: dict[str, str]
    keys: dict[str, Any]

    @property
    def arch_and_size(self) -> tuple[str, str] | None:
        """Such as rwkv7 and 1.5b, which begin the name of the file; None: it makes a model of its own."""
        found = re.match(r"(\w+?)-(\d+)b(\d+)-", self.file.name)
        return (found[1], f"{found[2]}.{found[3]}b") if found and "load" in self.keys["model"] else None

    @property
    def planned(self) -> re.Match[str]:
        """Of the field Memory: GiB, strategy, ranks, command. Raises: ValueError if it says none."""
        found = re.fullmatch(PLANNED, self.header["Memory"])
        if found is None:
            raise ValueError(f"{self.file}: Memory must say: N GiB on each device (STRATEGY, N ranks): infctx plan ...")
        return found


def read(file: Path) -> Recipe:
    """A recipe. Raises: ValueError if its header lacks a field."""
    text, header, name = file.read_text(), {"does": ""}, "does"
    for line in text[: re.search(r"^[^#]", text, re.M).start()].splitlines():  # type: ignore[union-attr]
        said = line[1:].strip()
        if (field := said.partition(":")[0]) in FIELDS:
            name, said = field, said.partition(":")[2].strip()
            header[name] = ""
        header[name] = f"{header[name]} {said}".strip()
    if missing := [x for x in FIELDS if x not in header]:
        raise ValueError(f"{file}: its header must say {missing[0]}")
    return Recipe(file, header, yaml.safe_load(text))


def recipes() -> list[Recipe]:
    """All of them, by name."""
    return [read(file) for file in sorted((ROOT / "recipes").glob("*.yaml"))]


def page(found: list[Recipe]) -> str:
    """What recipes/README.md holds."""
    return HEAD + "\n".join(_row(recipe) for recipe in found) + "\n" + TAIL


def _row(recipe: Recipe) -> str:
    model, data = recipe.keys["model"], recipe.keys["data"]
    if recipe.arch_and_size:
        arch, size = recipe.arch_and_size
        what = f"{NAMES[arch]} {size.upper()}"
    else:
        init = model["init"]
        what = f"new {NAMES[init['arch']]}, {init['n_layer']} layers of {init['n_embd']} channels"
    tuning = model.get("tuning")
    trained = "all weights" if tuning is None else "the initial state" if tuning["method"] == "state" else (
        f"{tuning['method']}, rank {tuning['rank']}")  # fmt: skip
    window = f"{data['batch_size']} x {data['segment_length']:,}, {data['segments_per_window']}"
    window += f", horizon {model['horizon']}" if model.get("horizon") else ""
    gib, strategy, ranks, _ = recipe.planned.groups()
    memory = gib if ranks == "1" else f"{gib} ({strategy}, {ranks} ranks)"
    cells = [f"[{recipe.file.stem}]({recipe.file.name})", what, recipe.header["does"], trained, window, memory]
    return f"| {' | '.join(cells)} |"


def command(recipe: Recipe) -> list[str]:
    """What the header says to plan by, with a new model in the place of the weights."""
    words = shlex.split(recipe.planned[4])[1:]
    if recipe.arch_and_size:
        sizes = dataclasses.asdict(sized(*recipe.arch_and_size))
        words += ["--model.load", "null", "--model.init", yaml.safe_dump(sizes, default_flow_style=True, width=10**6)]
    return words


def plan(recipe: Recipe) -> float:
    """GiB of a device at its peak, as `infctx plan` says it. Raises: ValueError if the recipe does not fit there."""
    done = subprocess.run([sys.executable, "-m", "infctx", *command(recipe)], cwd=ROOT, capture_output=True, text=True)
    rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    names = next((row for row in rows if row[0] == "strategy"), [])
    found = next((row for row in rows if row[0] == recipe.planned[2] and len(row) == len(names)), None)
    if found is None or found[names.index("fits")] != "yes":
        raise ValueError(f"{recipe.file}: does not fit, or not planned:\n{done.stdout}{done.stderr}")
    gib = int(found[names.index("peak MiB")]) / 1024
    return round(gib, 1 if gib >= 1 else 2)


def main() -> None:
    """Plan where asked, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], help="words of which the name holds one")
    options = parser.parse_args()
    for recipe in recipes() if options.plan else []:
        if any(word in recipe.file.stem for word in options.only):
            gib = plan(recipe)
            text = recipe.file.read_text()
            recipe.file.write_text(re.sub(r"^# Memory: [\d.?]+ GiB", f"# Memory: {gib} GiB", text, flags=re.M))
            print(f"{recipe.file.stem}: {gib} GiB", flush=True)
    (ROOT / "recipes" / "README.md").write_text(page(recipes()))


if __name__ == "__main__":
    main()
