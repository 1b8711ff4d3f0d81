"""A run's figures as one HTML page that needs no network, for a phone as for a screen, light or dark."""

import html
import json
from pathlib import Path
from typing import Any

from infctx import plots, samplepage
from infctx.checkpoint import runs_near
from infctx.curves import METRICS, PLANNED, SAMPLES, STATE_NORMS, TRAINED, VALIDATION, Line, per_token, some, thinned

_LIGHT = ("#1d2026", "#ffffff", "#5b616b", "#c9ccd1", "#1f6fb4", "#c04a0e", "#2b7d3a", "#7a4fb5", "#a5316f", "#6b6410")
_DARK = ("#e4e6ea", "#16181c", "#a3a9b3", "#474c55", "#6cb4f0", "#f59a5c", "#74c983", "#bb9af0", "#ee86bd", "#cfc45c")
_NAMES = ("ink", "paper", "soft", "grid", *(f"line{i}" for i in range(plots.SLOTS)))


MOST = 12  # sources in one plot


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f"--{name}:{x};" for name, x in zip(_NAMES, values, strict=True))


STYLE = (
    f":root{{color-scheme:light dark;{_colours(_LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_colours(_DARK)}}}}}"
    "*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:0 auto;padding:1rem;"
    "background:var(--paper);color:var(--ink);overflow-wrap:anywhere}"
    "h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.25rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 0}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1rem}"
    "figure{margin:0;min-width:0}figcaption{font-size:.9rem;color:var(--soft)}figcaption b{color:var(--ink)}"
    "svg{display:block;width:100%;height:auto}svg text{fill:var(--ink)}"
    "table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top;"
    "border-bottom:1px solid var(--grid);font-weight:normal}td{font-variant-numeric:tabular-nums}"
    "pre{overflow-x:auto;border:1px solid var(--grid);padding:.8rem;border-radius:6px;font-size:.8rem}"
    "summary{cursor:pointer}.none{color:var(--soft)}"
) + samplepage.style()


def write_report(run: str | Path) -> Path:
    """Write report.html into a run folder. Raises: FileNotFoundError, or ValueError if no step was made yet."""
    run = Path(run)
    if not (run / METRICS).is_file():
        raise FileNotFoundError(f"{run}: no run there (no {METRICS}){runs_near(run)}")
    lines, each = thinned(run / METRICS)
    if not lines:
        raise ValueError(f"{run}: no step was made yet, so there is nothing to report")
    validation, plan = thinned(run / VALIDATION)[0], _json(run / PLANNED) or {}
    parts = {
        "Figures": _table(lines, validation) + _thinning(each),
        "Loss": _loss(lines, validation),
        "Gradient": _gradient(lines),
        "States": _states(some(run / STATE_NORMS)),
        "Memory and speed": _resources(lines, plan),
        "Learning rate": _rates(lines),
        "Samples": _samples(_json(run / SAMPLES)),
        "What was trained": _trained(run / TRAINED),
        "Recipe": _recipe(run / "config.yaml"),
    }
    body = "".join(f"<section><h2>{title}</h2>{part}</section>" for title, part in parts.items())
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(run.resolve().name)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{html.escape(run.resolve().name)}</h1>{body}</main></body></html>"
    )
    (run / "report.html").write_text(page, encoding="utf-8")
    return run / "report.html"


def lacks_plan(run: str | Path) -> bool:
    """Whether a run that could have been planned was not: its note says why."""
    noted = _json(Path(run, PLANNED))
    return noted is not None and "strategy" not in noted


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _none(why: str) -> str:
    return f'<p class="none">{why}</p>'


def _plots(*figures: tuple[str, str, str]) -> str:
    """Args: (title, what it says, SVG) of each; those without a picture only say why."""
    shown = "".join(f"<figure><figcaption><b>{t}.</b> {said}</figcaption>{svg}</figure>" for t, said, svg in figures)
    return f'<div class="plots">{shown}</div>'


def _thinning(each: int) -> str:
    return "" if each == 1 else f"<p>A point of the curves is the mean of {each:,} steps in a row.</p>"


def _table(lines: list[Line], validation: list[Line]) -> str:
    last, tail = lines[-1], [x["loss"] for x in lines[-max(1, len(lines) // 20) :] if "loss" in x]
    rates, losses = (sorted(x[key] for x in lines if key in x) for key in ("tokens_per_second", "loss"))
    first = next((x["loss"] for x in lines if "loss" in x), None)
    counts = {"steps": "step", "tokens": "tokens", "documents": "documents"}
    rows = {name: f"{last[key]:,.0f}" for name, key in counts.items() if key in last}
    if "seconds" in last:
        rows["time"] = f"{last['seconds']:,.0f} s"
    if losses and tail:
        rows["loss at the beginning"] = f"{first:.4f} nats per token"
        rows["loss, last twentieth of the steps"] = f"{sum(tail) / len(tail):.4f} nats per token"
    if validation and "loss" in validation[-1]:
        rows["validation loss at the end"] = f"{validation[-1]['loss']:.4f} nats per token"
    if rates:
        rows["speed, median"] = f"{rates[len(rates) // 2]:,.0f} tokens per second"
    if "peak_memory_bytes" in last:
        rows["peak memory"] = f"{last['peak_memory_bytes'] / 1e6:,.0f} MB"
    cells = "".join(f'<tr><th scope="row">{key}</th><td>{value}</td></tr>' for key, value in rows.items())
    return f"<table>{cells}</table>"


def _loss(lines: list[Line], validation: list[Line]) -> str:
    unit = "nats per token"
    series = {"training": plots.by_step(lines, "loss"), "validation": plots.by_step(validation, "loss")}
    figures = [("Loss", "Of each step's tokens, and of the held-out documents.",
                plots.curves("Loss", series, unit, marks=["validation"]))]  # fmt: skip
    sources = dict(plots.by_key(lines, "source_loss", per_token))
    held_out = {f"{x}, held out": y for x, y in plots.by_key(validation, "source_loss", per_token).items()}
    every = sources | held_out
    if len(sources) > 1 or len(held_out) > 1:  # of one alone it would be the loss once more
        most = dict(list(every.items())[:MOST])
        said = "Of the tokens of each source." + (f" {len(every) - MOST:,} more are not drawn." * (len(every) > MOST))
        svg = plots.curves("Loss by source", most, unit, marks=list(held_out))
        figures.append(("Loss by source", said, svg))
    if positions := plots.positions(lines):
        said = "In buckets of powers of two: what the model gains from what it has read before."
        x = "position in the document, tokens"
        svg = plots.curves("Loss by position", positions, unit, x=x, marks=list(positions), xscale="log")
        figures.append(("Loss by position in the document", said, svg))
    return _plots(*figures)


def _gradient(lines: list[Line]) -> str:
    figures, borders = [], plots.borders(lines)
    if borders:
        said = (
            "Norm of the gradient that a segment hands, through the states of all lanes, to the one before it: how far "
            "back from the window's end learning reaches. Each holds what all later segments add; where there is no "
            "point, none passes."
        )
        x = "segments between the border and the window's end"
        title = "Gradient at the borders of segments"
        svg = plots.curves(title, borders, "norm", x=x, marks=list(borders), xscale="log", yscale="log")
        figures.append((title, said, svg))
    norms = plots.by_step(lines, "grad_norm")
    if norms[0]:
        scale: dict[str, Any] = {"yscale": "log"} if min(norms[1]) > 0 else {}
        svg = plots.curves("Gradient norm", {"gradient": norms}, "norm", **scale)
        figures.append(("Gradient norm", "Of all that is trained, before clipping.", svg))
    why = "No gradient passes a border between segments: a window is one segment, the horizon is 1, or the run is old."
    return _plots(*figures) + ("" if borders else _none(why))


def _states(lines: list[Line]) -> str:
    kept = [(line["step"], line["norms"]) for line in lines]
    if not kept:
        return _none("This run noted no states: they are noted with each checkpoint.")
    layers = [i for i, row in enumerate(kept[-1][1]) if row]
    if not layers:
        return _none("This model has no recurrent states.")
    said = f"Norm of each head's recurrent state after step {kept[-1][0]:,}, mean over the lanes."
    grid = plots.heat("State norms", [kept[-1][1][i] for i in layers], "head", "layer", said)
    figures = [("States by layer and head", said, grid)]
    if len(kept) > 1:
        few = sorted({layers[round(i * (len(layers) - 1) / (plots.SLOTS - 1))] for i in range(plots.SLOTS)})
        steps = [step for step, _ in kept]
        series = {f"layer {i}": (steps, [sum(norms[i]) / len(norms[i]) for _, norms in kept]) for i in few}
        over = "Mean over the heads, at each checkpoint." + (" Not all layers." if len(few) < len(layers) else "")
        figures.append(("States over time", over, plots.curves("State norms", series, "norm", ylim=(0, None))))
    return _plots(*figures)


def _resources(lines: list[Line], plan: dict[str, Any]) -> str:
    figures = []
    for title, key, scale, unit in (("Speed", "tokens_per_second", 1.0, "tokens per second"),
                                    ("Peak memory", "peak_memory_bytes", 1e-6, "MB")):  # fmt: skip
        level = ("planned", plan[key] * scale) if key in plan else None
        series = {"measured": plots.by_step(lines, key, scale)}
        if series["measured"][0]:
            said = "Of all ranks together." if key == "tokens_per_second" else "Of the first rank, so far."
            figures.append((title, said, plots.curves(title, series, unit, level=level, ylim=(0, None))))
    if "strategy" in plan:
        memory, speed = plan["peak_memory_bytes"] / 1e6, plan["tokens_per_second"]
        said = (
            f"Planned, for {html.escape(plan['strategy'])} on {plan['ranks']:,} of these devices: {memory:,.0f} MB a "
            f"rank and {speed:,.0f} tokens per second. On a CPU, what is measured is the whole process, with the "
            "libraries that it has loaded, which the plan leaves out."
        )
    else:
        said = f"Not compared with a plan: {html.escape(plan.get('skipped', 'this run has none'))}."
    return _plots(*figures) + f"<p>{said}</p>"


def _rates(lines: list[Line]) -> str:
    series: dict[str, Any] = {}
    for name, curve in plots.by_key(lines, "group_lr", dict).items():  # names of the same curve are one
        same = next((x for x, y in series.items() if y == curve), None)
        series[name if same is None else f"{same}, {name}"] = curve if same is None else series.pop(same)
    if not series:
        series = {"all": plots.by_step(lines, "lr")}
    if not any(len(xs) for xs, _ in series.values()):
        return _none("This run noted no rates.")
    said = "Of each group of parameters." if len(series) > 1 else "Of everything that is trained."
    return _plots(("Learning rate", said, plots.curves("Learning rate", series, "learning rate", ylim=(0, None))))


def _samples(samples: Any) -> str:
    return samplepage.section(samples) if samples else _none("This run has none: they are made at its end.")


def _trained(file: Path) -> str:
    if not file.is_file():
        return _none("This run did not note it.")
    text = html.escape(file.read_text(encoding="utf-8").rstrip("\n"))
    return f'<pre tabindex="0" role="region" aria-label="table of what was trained">{text}</pre>'


def _recipe(file: Path) -> str:
    if not file.is_file():
        return _none("This folder holds no config.yaml.")
    text = html.escape(file.read_text(encoding="utf-8"))
    return f'<details><summary>config.yaml, as resolved</summary><pre tabindex="0">{text}</pre></details>'
