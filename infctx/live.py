"""Commands from a notebook: seen while they run, and an error where they fail.

Nothing here needs a notebook: without one the view is lines of text.
"""

import io
import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from infctx.curves import METRICS, POINTS, lines_of
from infctx.plots import as_written, listed

EVERY = 1.0  # seconds between two looks at a run's figures
TAIL = 12  # lines of its output that a failed command is quoted with


class CommandError(RuntimeError):
    """A command that did not end with exit code 0; the message has its last lines."""


def run(*argv: object, stdin: str = "") -> None:
    """Run `infctx ARGV`, show its output as it comes, and follow the figures of a `fit`.

    Args:
        argv: the command and its options; paths and numbers too.
        stdin: what is typed into it.
    Raises: CommandError if its exit code is not 0. An interrupt stops the command as well.
    """
    output(*argv, stdin=stdin)


def output(*argv: object, stdin: str = "") -> str:
    """As `run`. Returns: all that the command printed, its error output too."""
    words = [str(x) for x in argv]
    print("$", shlex.join(["infctx", *words]), flush=True)
    following = words[:1] == ["fit"]
    if following:  # the view takes the place of the bar
        words.append("--trainer.enable_progress_bar=false")
    view, said = View(), list[str]()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as typed:
        typed.write(stdin)
        typed.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "infctx", *words], stdin=typed, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    try:
        for line in _lines(process):
            if line is not None:
                said.append(line)
                print(line, end="", flush=True)
                if following and line.startswith("run: "):
                    view.folder = Path(line[5:].rstrip("\n").split(", resumed from ")[0])
            view.look()
        code = process.wait()
    finally:
        _end(process)
    if code:
        raise CommandError(f"infctx {words[0] if words else ''}: exit code {code}\n{''.join(said[-TAIL:]).rstrip()}")
    view.look(last=True)
    return "".join(said)


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The figures of a run, a step each; none if there is no step yet."""
    return list(lines_of(Path(run, METRICS)))


def plot(axis: Any, runs: Mapping[str, str | Path], key: str = "loss", smooth: int = 1) -> None:
    """Draw a figure of some runs by step.

    Args:
        axis: of matplotlib.
        runs: run folders by the name that the legend has.
        key: of metrics.jsonl.
        smooth: each point is the mean of so many steps up to it.
    """
    for label, folder in runs.items():
        lines = metrics(folder)
        values = [x[key] for x in lines]
        means = [sum(part) / len(part) for part in (values[max(0, i + 1 - smooth) : i + 1] for i in range(len(values)))]
        axis.plot([x["step"] for x in lines], means, lw=1.5, label=listed(label))
    axis.set(xlabel="optimizer step", ylabel="loss, nats per token" if key == "loss" else key.replace("_", " "))
    axis.grid(alpha=0.3)
    if any(runs):
        as_written(axis.legend())


def fresh(folder: str | Path) -> Path:
    """Make a new folder under `folder`: 001, 002, ...; what earlier ones hold stays."""
    for i in count(1):
        path = Path(folder) / f"{i:03}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("count does not end")


class View:
    """What is seen of a run: in a notebook a plot that is drawn again, elsewhere a line of text now and then."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._next, self._handle = 0.0, None
        self._read, self._lines = 0, list[dict[str, Any]]()

    def look(self, last: bool = False) -> None:
        """Show the figures, if there are new ones and the last look was a while ago."""
        now = time.monotonic()
        if self.folder is None or (now < self._next and not last):
            return
        self._next = now + EVERY
        if self._more():
            self._show(self._lines)

    def _more(self) -> bool:
        """Read what was written since the last look. Returns: whether there was a line."""
        file = Path(self.folder or "", METRICS)
        if not file.exists():
            return False
        with file.open("rb") as stream:
            stream.seek(self._read)
            whole = stream.read().rpartition(b"\n")[0]  # a last line may be half written
        if not whole:
            return False
        self._read += len(whole) + 1
        self._lines += [json.loads(line) for line in whole.split(b"\n")]
        return True

    def _show(self, lines: list[dict[str, Any]]) -> None:
        now = lines[-1]
        text = f"step {now['step']:,}: loss {now['loss']:.3f}, {now['tokens']:,} tokens, {now['seconds']:.0f} s"
        if not _in_notebook():
            print(text, flush=True)
            return
        from IPython.display import Image, display

        picture = Image(data=_picture(lines, text), alt=text)
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)


def _picture(lines: list[dict[str, Any]], title: str) -> bytes:
    from matplotlib.figure import Figure  # takes a while to import

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    lines = lines[:: -(-len(lines) // POINTS)]
    axis.plot([x["step"] for x in lines], [x["loss"] for x in lines], marker="." * (len(lines) < 20), lw=1.2)
    axis.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _in_notebook() -> bool:
    """Whether a kernel shows what is displayed; IPython in a terminal does not."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


def _lines(process: "subprocess.Popen[str]") -> Iterator[str | None]:
    """The lines of a process until it closes its output; None where none came for a while."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    stream = process.stdout

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=EVERY)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _end(process: "subprocess.Popen[str]") -> None:
    """Leave no process behind, whatever happened here."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
