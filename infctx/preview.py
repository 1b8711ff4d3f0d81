"""The command `preview`: documents as the model will see them, and what an epoch is made of."""

import io
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from infctx.data import DocumentData
from infctx.loader import Documents, WindowLoader
from infctx.loss import IGNORED
from infctx.planning import data_of, parallel_of, require_sound, stand_in
from infctx.segments import Plan, Window
from infctx.tokentext import BORDER, CLOSE, LEARNT, MARKS, NOTE, OPEN, READ, add_tokens

HEAD, TAIL = 400, 200  # tokens shown of a long document
BAR = 24  # characters of the longest one: the line fits on a phone
PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>preview</title><style>{stylesheet}body{{color:{foreground};background:{background};margin:2rem auto;"
    "max-width:60rem;padding:0 1rem}}pre{{font:15px/1.5 ui-monospace,monospace;white-space:pre-wrap;"
    "overflow-wrap:anywhere}}</style><pre>{code}</pre></html>"
)


class Stretch(NamedTuple):
    """Tokens of a document as they lie in a lane."""

    document: int
    begin: int  # place in the document of the first of them
    ids: np.ndarray  # (n,)
    learnt: np.ndarray  # (n,) bool
    borders: dict[int, str]  # what begins in front of a token, by its place in the stretch


def preview_recipe(config: Any) -> None:
    """Show what a recipe would train on. Raises: ValueError naming the key that is at fault."""
    if config.documents < 0:
        raise ValueError(f"--documents must be at least 0, got {config.documents}")
    require_sound(config)
    data = data_of(config.data)
    data.prepare_data()
    data.setup("fit")
    data.parallel, data.seed = parallel_of(config), int(config.seed_everything)
    data.trainer = stand_in(config.trainer, _ranks(config.trainer, data.parallel.time), 0)
    loader, count, first = data.train_dataloader(), len(data.train), config.first
    if not len(loader):
        raise ValueError(f"trainer.limit_train_batches {config.trainer.limit_train_batches} leaves no window")
    if first is not None and not 0 <= first < count:
        raise ValueError(f"--first {first}: there is no such document; they are 0 to {count - 1:,}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack characters that documents have
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, soft_wrap=True)
    _show(console, data, loader, config, console.is_terminal and not console.no_color)
    if config.html is not None:
        page = Console(file=io.StringIO(), highlight=False, soft_wrap=True, record=True, force_terminal=True)
        _show(page, data, loader, config, True)
        Path(config.html).parent.mkdir(parents=True, exist_ok=True)
        Path(config.html).write_text(page.export_html(code_format=PAGE), encoding="utf-8")
        console.print(f"page: {config.html}", markup=False)


def _ranks(trainer: Any, time: int) -> int:
    """As many as the recipe names, and one where it leaves that to the machine."""
    devices = str(trainer.devices)
    return max(time, (int(devices) if devices.isdecimal() else 1) * (trainer.num_nodes or 1))


def _show(console: Console, data: DocumentData, loader: WindowLoader, config: Any, colours: bool) -> None:
    show = Shown(data, colours)
    if config.documents:
        console.print(_legend(colours))
    found = show.windows(loader, config.documents) if config.first is None else show.whole(
        loader.plan, range(config.first, min(config.first + config.documents, len(data.train)))
    )  # fmt: skip
    for text in found:
        console.print(text)
    for line in summary(data, config.model.horizon):
        console.print(line, markup=False)


def _legend(colours: bool) -> Text:
    learnt, read = ("learnt", "only read") if colours else (f"{OPEN}learnt{CLOSE}", "only read")
    return Text.assemble(
        (learnt, LEARNT), ", ", (read, READ), ", ", (MARKS["segment"], BORDER), " a segment begins, ",
        (MARKS["window"], BORDER), " a window begins; ⟨end⟩ ends a document, ⟨7⟩ is a token without text, "
        "↵ a line's end, → a tab, \\x1b a byte or character that does not show",
    )  # fmt: skip


class Shown:
    """Documents as texts for a terminal."""

    def __init__(self, data: DocumentData, colours: bool) -> None:
        self.documents, self.tokenizer, self.colours = data.train, data.tokenizer, colours
        self.shape = data.segment_length, data.segments_per_window

    def windows(self, loader: WindowLoader, most: int) -> Iterator[Text]:
        """The first windows, until so many documents, or parts of them, were shown."""
        shown = 0
        for i in range(len(loader)):
            if shown >= most:
                return
            window = loader.window(i)
            lanes, segments, length = window.tokens.shape
            empty = int((window.ids < 0).sum())
            padding = f", {empty:,} places of padding" if empty else ""
            head = (
                f"window {i} of {len(loader):,} in epoch 0: {lanes} lanes, {segments:,} segments of {length:,} tokens"
            )
            yield Text(f"\n{MARKS['window']} {head}{padding}", BORDER)
            for lane in range(lanes):
                for stretch in stretches(window, lane, self.documents):
                    if shown == most:
                        return
                    shown += 1
                    yield self.text(stretch, f"lane {lane}")

    def whole(self, plan: Plan, numbers: range) -> Iterator[Text]:
        """Documents by number, cut as epoch 0 cuts them."""
        for number in numbers:
            lane, place = _find(plan, number)
            where, used = f"lane {lane} of epoch 0", plan
            if lane < 0:
                where, lane = "not read in epoch 0, so shown in a window of its own", 0
                used = Plan(plan.inputs, 1, *self.shape, 0, 0, np.array([number]))
            yield self.text(joined(self.documents, used, number, lane, place), where)

    def text(self, stretch: Stretch, where: str) -> Text:
        """A headline and the tokens; long ones without their middle."""
        d, n, number = self.documents, len(stretch.ids), stretch.document
        total = int(d.inputs[number]) + 1
        part = "" if n == total else f"tokens {stretch.begin:,} to {stretch.begin + n - 1:,} of "
        learnt = int(stretch.learnt.sum())
        head = (
            f"document {number}, {d.names[d.source[number]]}: {part}{total:,} tokens, {learnt:,} learnt here, {where}"
        )
        out = Text.assemble((f"\n{head}\n", "bold"))
        if n <= HEAD + TAIL:
            self._add(out, stretch, 0, n)
        else:
            self._add(out, stretch, 0, HEAD)
            out.append(f"\n{_gone(stretch, HEAD, n - TAIL)}\n", NOTE)
            self._add(out, stretch, n - TAIL, n)
        if stretch.begin + n < total:
            out.append(" ... goes on in the next window", NOTE)
        return out

    def _add(self, out: Text, stretch: Stretch, begin: int, end: int) -> None:
        borders = {i - begin: kind for i, kind in stretch.borders.items() if begin <= i < end}
        add_tokens(out, stretch.ids[begin:end], stretch.learnt[begin:end], borders, self.tokenizer, self.colours)


def stretches(window: Window, lane: int, documents: Documents) -> Iterator[Stretch]:
    """What a lane of a window holds. The last token of a document, which is only a target, is there too."""
    tokens, targets, start, ids = (x[lane].flatten().numpy() for x in window[:4])
    length = window.tokens.shape[2]
    assert window.position is not None
    position = window.position[lane].flatten().numpy()
    cuts = np.flatnonzero(start[1:] | (ids[1:] != ids[:-1])) + 1
    for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)], strict=True):
        d, begin = int(ids[a]), int(position[a])
        if d < 0:
            continue
        # A mask belongs to the target, so that of the first token here stood in the window before.
        first = documents.mask(d, begin, begin + 1) if begin else np.zeros(1, bool)
        kept, learnt = tokens[a:b], np.concatenate([first, targets[a : b - 1] != IGNORED])
        end = begin + b - a
        if end == documents.inputs[d]:
            kept = np.concatenate([kept, documents.tokens(d, end, end + 1).astype(np.int64)])
            learnt = np.append(learnt, targets[b - 1] != IGNORED)
        borders = dict.fromkeys(range(-(-(a + 1) // length) * length - a, b - a, length), "segment")
        yield Stretch(d, begin, kept, learnt, borders | ({0: "window"} if begin else {}))


def _find(plan: Plan, number: int) -> tuple[int, int]:
    """The lane of a document, and its place there; -1 if the epoch does not read it."""
    for lane, (documents, begins) in enumerate(zip(plan.documents, plan.begins, strict=True)):
        found = np.flatnonzero(documents == number)
        if len(found):
            return lane, int(begins[found[0]])
    return -1, 0


def joined(documents: Any, plan: Plan, number: int, lane: int, place: int) -> Stretch:
    """A document's stretches of all windows that it is in."""
    loader = WindowLoader(documents, lambda _: plan, range(lane, lane + 1), 1, 0, {})
    parts, size, borders = list[Stretch](), 0, dict[int, str]()
    i = bisect_right(plan.borders, place) - 1
    while size <= documents.inputs[number]:
        for part in stretches(loader.window(i), 0, documents):
            if part.document == number and part.begin == size <= documents.inputs[number]:
                borders |= {size + at: kind for at, kind in part.borders.items()}
                parts, size = [*parts, part], size + len(part.ids)
        i += 1
    ids, learnt = (np.concatenate([part[k] for part in parts]) for k in (2, 3))
    return Stretch(number, 0, ids, learnt, borders)


def _gone(stretch: Stretch, begin: int, end: int) -> str:
    kinds = [kind for i, kind in stretch.borders.items() if begin <= i < end]
    borders = "".join(f", {kinds.count(x):,} borders of {x}s" for x in MARKS if x in kinds)
    return f"... {end - begin:,} tokens not shown, {int(stretch.learnt[begin:end].sum()):,} of them learnt{borders} ..."


def summary(data: DocumentData, horizon: int | None) -> list[str]:
    """What was prepared and what became of the rest, what an epoch reads, how long documents are, how they are cut."""
    d, rows = data.train, data.rows(0)
    lines = ["", "prepared:", *d.account(), "", "an epoch reads (epoch 0):"]
    whole = max(1, int(d.supervised[rows].sum()))
    for number, (name, source) in enumerate(zip(d.names, data.sources, strict=True)):
        mine = rows[d.source[rows] == number]
        targets, learnt = int(d.inputs[mine].sum()), int(d.supervised[mine].sum())
        limit = "" if source.limit is None else f"; limited to the first {source.limit:,} documents"
        lines.append(
            f"{name}: {len(mine):,} documents (weight {source.weight:g}), {targets:,} targets, {learnt:,} learnt "
            f"({learnt / max(1, targets):.1%}), {learnt / whole:.1%} of all that is learnt{limit}"
        )
    ranks = data.trainer.world_size
    shown = [f"for {ranks} ranks, of which the first one's lanes are shown"] if ranks > 1 else []
    return [*lines, "", "tokens in a document, and how many documents have as many:", *histogram(d.inputs + 1), "",
            *shown, data.describe(horizon)]  # fmt: skip


def histogram(lengths: np.ndarray) -> list[str]:
    """Bars by power of two. Args: lengths: (documents,), 1 or more."""
    counts = np.bincount(np.frexp(lengths)[1] - 1)
    top = int(counts.max())
    width, lines = len(f"{2 ** len(counts) - 1:,}"), list[str]()
    for i in range(int(np.flatnonzero(counts)[0]), len(counts)):
        span = f"{2**i:>{width},} to {2 ** (i + 1) - 1:>{width},}"
        bar = "█" * -(-int(counts[i]) * BAR // top)
        lines.append(f"{span} {counts[i]:>{len(f'{top:,}')},} {bar}".rstrip())
    return lines
