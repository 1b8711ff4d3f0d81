"""Plots as SVG that lies in a page and takes its colours: light or dark as the reader has it.

A plot is drawn in stand-ins, each of which becomes a CSS variable. It is as wide as a phone: text keeps its size there.
"""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infctx.curves import Line, averaged, merged, per_token

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> x, y
SIZE = (4.6, 2.9)  # inches: about 330 CSS pixels, one for a point
LEGEND_ROW = 0.19  # inches
SLOTS = 6  # colours of lines
# A stand-in of each colour, none of which a plot has for itself.
STANDINS = {"#010203": "--ink", "#010204": "--grid"} | {f"#01{i:02x}05": f"--line{i}" for i in range(SLOTS)}
INK, GRID, *LINES = STANDINS
LABEL = 44  # characters of a label that fit
DASHES = ("-", "--", "-.", ":")


def curves(title: str, series: Series, ylabel: str, *, x: str = "optimizer step", marks: Sequence[str] = (),
           level: tuple[str, float] | None = None, **axes: Any) -> str:  # fmt: skip
    """Lines over one axis. Args: marks: labels of series drawn with points. level: a level line, and what it is."""
    figure, axis = _figure()
    shown = {listed(label): xy for label, xy in series.items() if len(xy[0])}
    for i, (label, (xs, ys)) in enumerate(shown.items()):
        point = "o" if label in marks or len(xs) == 1 else ""
        dash = DASHES[i // SLOTS % len(DASHES)]
        axis.plot(xs, ys, marker=point, ms=3, lw=1.3, ls=dash, color=LINES[i % SLOTS],
                  label=label if len(label) <= LABEL else f"{label[: LABEL - 1]}…")  # fmt: skip
    if level is not None:
        axis.axhline(level[1], color=INK, lw=1, ls="--", label=level[0])
    options: dict[str, str] = {key: axes.pop(key) for key in ("xscale", "yscale") if key in axes}
    for key, scale in options.items():
        getattr(axis, f"set_{key}")(scale, base=2 if key == "xscale" else 10)
    axis.set(xlabel=x, ylabel=ylabel, **axes)
    _number(axis, options)
    if len(shown) + (level is not None) > 1:
        columns = 2 if max(map(len, shown)) <= 24 else 1
        rows = -(-(len(shown) + (level is not None)) // columns)
        figure.set_figheight(SIZE[1] + LEGEND_ROW * rows)
        _place(figure, LEGEND_ROW * rows)
        legend = figure.legend(
            loc="upper left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0,
            frameon=False,
            labelcolor=INK,
            fontsize=9,
            ncols=columns,
            handlelength=1.6,
        )
        as_written(legend)
    said = "; ".join(f"{label}: {_say(ys[0])} at {_say(xs[0])}, {_say(ys[-1])} at {_say(xs[-1])}"
                     for label, (xs, ys) in list(shown.items())[:SLOTS])  # fmt: skip
    return _svg(figure, f"{title}: {ylabel} by {x}. {said}")


def listed(label: str) -> str:
    """A label that a legend shows: matplotlib leaves those out that begin with a line."""
    return f" {label}" if label[:1] == "_" else label


def as_written(legend: Any) -> None:
    """Show names of files as they are: a $ in them is no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def heat(title: str, rows: Sequence[Sequence[float]], xlabel: str, ylabel: str, what: str) -> str:
    """A map of numbers. Args: rows: as long as each other."""
    figure, axis = _figure()
    axis.grid(False)
    image = axis.imshow(rows, aspect="auto", cmap="cividis", interpolation="nearest", origin="lower", vmin=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    for one in (axis.xaxis, axis.yaxis):
        one.get_major_locator().set_params(integer=True, min_n_ticks=1)
    bar = figure.colorbar(image, ax=axis)
    bar.solids.set_rasterized(True)
    bar.outline.set_edgecolor(GRID)
    bar.ax.tick_params(colors=INK, labelsize=9)
    flat = [x for row in rows for x in row]
    return _svg(figure, f"{title}: {what}, from {_say(min(flat))} to {_say(max(flat))}")


def by_step(lines: Sequence[Line], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """A field over the steps, of the lines that have it."""
    chosen = [line for line in lines if key in line]
    return [x["step"] for x in chosen], [x[key] * scale for x in chosen]


def by_key(lines: Sequence[Line], key: str, value: Callable[[Any], Mapping[Any, float]]) -> Series:
    """A field with numbers of several names: a line for each name."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, number in value(line.get(key, [])).items():
            xs, ys = series.setdefault(str(name), ([], []))
            xs.append(line["step"])
            ys.append(number)
    return series


def quarters(lines: Sequence[Line], key: str) -> dict[str, list[Any]]:
    """A field of the first and the last quarter of a run, of the lines that have it."""
    chosen = [line[key] for line in lines if line.get(key)]
    n = max(1, len(chosen) // 4)
    parts = {"first quarter of the run": chosen[:n], "last quarter": chosen[-n:]} if len(chosen) > 1 else {"": chosen}
    return {label: part for label, part in parts.items() if part}


def positions(lines: Sequence[Line]) -> Series:
    """Loss by position in the document, in buckets of powers of two."""
    found = {}
    for label, part in quarters(lines, "position_loss").items():
        loss = dict(sorted(per_token(merged(part)).items()))
        found[label] = [2**i for i in loss], list(loss.values())
    return found


def borders(lines: Sequence[Line]) -> Series:
    """Norm of the gradient at a border by its distance from the window's end, as the root of the mean square."""
    found = {}
    for label, part in quarters(lines, "border_gradient").items():
        norms = sorted(averaged(part, 2.0))
        found[label] = [x[0] for x in norms], [x[1] for x in norms]
    return found


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # takes a while to import; no display is needed this way

    figure = Figure(figsize=SIZE)
    _place(figure)
    figure.patch.set_visible(False)
    axis = figure.subplots()
    axis.patch.set_visible(False)
    axis.grid(color=GRID, lw=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=INK, labelsize=9)
    for spine in axis.spines.values():
        spine.set_color(GRID)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, fontsize=10)
    axis.xaxis.get_offset_text().set_color(INK)
    axis.yaxis.get_offset_text().set_color(INK)
    return figure, axis


def _place(figure: Any, legend: float = 0.0) -> None:
    """The axes' place: matplotlib would find one by drawing all of it twice. Args: legend: inches above them."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.12 / width, 1 - (0.1 + legend) / height)


def _number(axis: Any, scales: Mapping[str, str]) -> None:
    """Plain numbers at the ticks."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for one in [axis.xaxis] * ("xscale" in scales) + [axis.yaxis] * ("yscale" in scales):
        one.set_major_formatter(FuncFormatter(lambda x, _: _say(x)))
        one.set_minor_formatter(NullFormatter())
    if "yscale" in scales:
        low, high = axis.get_ylim()
        if high < 100 * low:  # few powers of ten, or none
            axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    if "xscale" not in scales:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "yscale" not in scales:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _say(y)))


def _say(x: float) -> str:
    """A number as short as it can be read: 0.0123, 512, 16k."""
    if x and abs(x) < 1e-3:
        return f"{x:.1e}".replace("e-0", "e-").replace(".0e", "e")
    for bound, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(x) >= bound:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"


def _svg(figure: Any, label: str) -> str:
    """The picture alone, with nothing that names a place outside of the page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", text.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", body)
    for standin, variable in STANDINS.items():
        body = body.replace(standin, f"var({variable})")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">{body.strip()}'
