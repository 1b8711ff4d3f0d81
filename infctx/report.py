"""A run's figures as one HTML page that needs no network: loss, speed, memory, loss by position in the document."""

import html
import io
import json
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]

STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "figure{margin:1.5rem 0;background:#fff;border-radius:8px;padding:.5rem}figure svg{width:100%;height:auto}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #8886}"
    "pre{overflow-x:auto;background:#8882;padding:1rem;border-radius:8px}"
)


def write_report(run: str | Path) -> Path:
    """Write report.html into a run folder. Raises: FileNotFoundError, or ValueError if no step was made yet."""
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{run}: no run there (no metrics.jsonl)")
    lines = _read(run / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run}: no step was made yet, so there is nothing to report")
    validation = _read(run / "validation.jsonl")
    plots = [_curves(lines, validation), _positions(lines)]
    config = run / "config.yaml"
    recipe = f"<h2>Recipe</h2><pre>{html.escape(config.read_text())}</pre>" if config.exists() else ""
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(run.name)}</title><style>{STYLE}</style><h1>{html.escape(run.name)}</h1>"
        f"{_table(lines, validation)}{''.join(f'<figure>{plot}</figure>' for plot in plots)}{recipe}</html>"
    )
    (run / "report.html").write_text(page)
    return run / "report.html"


def _read(file: Path) -> Lines:
    return (
        [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    )  # not a torn last one


def _table(lines: Lines, validation: Lines) -> str:
    last, tail = lines[-1], lines[-max(1, len(lines) // 20) :]
    rows = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "documents": f"{last['documents']:,}",
        "time": f"{last['seconds']:,.0f} s",
        "loss, first step": f"{lines[0]['loss']:.4f} nats per token",
        "loss, last twentieth of the steps": f"{sum(x['loss'] for x in tail) / len(tail):.4f}",
        "tokens per second, median": f"{sorted(x['tokens_per_second'] for x in lines)[len(lines) // 2]:,.0f}",
        "peak memory": f"{last['peak_memory_bytes'] / 1e6:,.0f} MB",
    } | ({"validation loss": f"{validation[-1]['loss']:.4f}"} if validation else {})
    return "<table>" + "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows.items()) + "</table>"


def _curves(lines: Lines, validation: Lines) -> str:
    figure, axes = _figure(3, (9, 8.5))
    step = [x["step"] for x in lines]
    axes[0].plot(step, [x["loss"] for x in lines], lw=1, label="training")
    if validation:
        axes[0].plot([x["step"] for x in validation], [x["loss"] for x in validation], "o-", label="validation")
    axes[0].set(ylabel="loss, nats per token")
    axes[0].legend()
    axes[1].plot(step, [x["tokens_per_second"] for x in lines], lw=1)
    axes[1].set(ylabel="tokens per second", ylim=(0, None))
    axes[2].plot(step, [x["peak_memory_bytes"] / 1e6 for x in lines], lw=1)
    axes[2].set(ylabel="peak memory, MB", ylim=(0, None), xlabel="optimizer step")
    return _svg(figure)


def _positions(lines: Lines) -> str:
    figure, (axis,) = _figure(1, (9, 3.5))
    quarter = max(1, len(lines) // 4)
    for label, part in {"first quarter of the run": lines[:quarter], "last quarter": lines[-quarter:]}.items():
        sums: dict[int, tuple[float, int]] = {}
        for line in part:
            for bucket, loss, tokens in line["position_loss"]:
                old = sums.get(bucket, (0.0, 0))
                sums[bucket] = (old[0] + loss, old[1] + tokens)
        places = sorted(sums)
        axis.plot([2**i for i in places], [sums[i][0] / sums[i][1] for i in places], "o-", label=label)
    axis.set(xscale="log", xlabel="position in the document, tokens", ylabel="loss, nats per token")
    axis.set_xscale("log", base=2)
    axis.legend()
    return _svg(figure)


def _figure(rows: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # takes a while to import; no display is needed this way

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
