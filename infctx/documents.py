"""From records to tokens on disk that are read a stretch at a time.

`prepare` writes one Arrow file and a `prepared.json` that names it and says what it was made from.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from infctx.arrowfile import Rows
from infctx.formats import document, load_function, shorten, targets
from infctx.records import data_set, records
from infctx.segments import Document
from infctx.sources import Source, listed
from infctx.templates import load_template
from infctx.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LAYOUT = 2  # of the Arrow file; part of the digest
FLUSH = 1 << 22  # tokens held before they are written: bounds the memory of `prepare`
KEPT = ("documents", "tokens", "supervised")
LEFT_OUT = {
    "empty": "without a target", "short": "shorter than min_tokens", "long": "longer than max_tokens",
    "bare": "pieces of split ones without a target",
}  # fmt: skip


def prepare(sources: Source | Sequence[Source], tokenizer: Tokenizer, path: str | Path) -> "ArrowDocuments":
    """Tokenise sources into `path`, or find that this was done with the same contents, tokenizer and settings.

    Raises: FileNotFoundError, or ValueError naming the file (and line) that cannot be used, or if nothing is left.
    """
    path, every = Path(path), listed(sources)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"data.path {path}: there is a file of that name: name a folder") from None
    for source in every:
        for warning in source.warnings():
            log.warning(warning)
    with FileLock(path / ".lock"):
        digest = _digest(every, tokenizer)
        meta = _read_meta(path)
        if meta and meta["digest"] == digest:
            print(f"data: {path} is up to date, digest {digest[:16]}")
            _write_meta(path, meta | {"names": [source.label for source in every]})
        else:
            if meta:
                print(f"data: {path} is stale (digest {meta['digest'][:16]}): source, tokenizer or settings changed")
            try:
                _write(every, tokenizer, path, digest)
            except BaseException:
                (path / f"{digest[:16]}.arrow.part").unlink(missing_ok=True)
                raise
            print(f"data: prepared {path}, digest {digest[:16]}")
        opened = ArrowDocuments.open(path)
    print(*opened.account(), sep="\n")
    return opened


class ArrowDocuments:
    """Prepared documents, memory-mapped: a stretch of a long one costs only its own bytes.

    Attributes:
        inputs: (documents,) int64, tokens of each but its last; supervised: (documents,) int64, targets to be learnt.
        source: (documents,) int32, which of the sources each is of; names: of the sources.
        digest: of sources, tokenizer and settings; left_out: documents without a target.
    """

    def __init__(self, table: Any, meta: dict[str, Any], rows: np.ndarray | None = None) -> None:
        self._table, self._meta = table, meta
        tokens, masks = table.column("tokens").chunks, table.column("mask").chunks
        self._chunks = [(t.values.to_numpy(), t.offsets.to_numpy(), m) for t, m in zip(tokens, masks, strict=True)]
        self._first = np.cumsum([0] + [len(offsets) - 1 for _, offsets, _ in self._chunks])
        lengths = np.concatenate([np.diff(offsets) for _, offsets, _ in self._chunks])
        self._rows = np.arange(len(lengths)) if rows is None else rows
        self.inputs = lengths[self._rows].astype(np.int64) - 1
        self.supervised = table.column("supervised").to_numpy()[self._rows]
        self.source, self.names = table.column("source").to_numpy()[self._rows], meta["names"]
        self.digest, self.left_out = meta["digest"], sum(count["empty"] for count in meta["counts"])

    @classmethod
    def open(cls, path: str | Path) -> "ArrowDocuments":
        """Raises: ValueError if the folder holds no whole prepared data."""
        import pyarrow as pa

        meta = _read_meta(Path(path))
        if meta is None:
            raise ValueError(f"{path} holds no prepared data, or not all of it: run `infctx prepare` again")
        with pa.memory_map(str(Path(path, meta["file"]))) as file:  # what was read goes on to map it
            return cls(pa.ipc.open_stream(file).read_all(), meta)

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, rows: np.ndarray) -> "ArrowDocuments":
        """Some of the documents, renumbered."""
        return ArrowDocuments(self._table, self._meta, self._rows[rows])

    def account(self) -> list[str]:
        """What became of each source, a line for each."""
        lines = []
        for name, count in zip(self.names, self._meta["counts"], strict=True):
            kept = f"{count['documents']:,} documents, {count['tokens']:,} tokens ({count['supervised']:,} supervised)"
            gone = "".join(f"; left out, {why}: {count[key]:,}" for key, why in LEFT_OUT.items() if count[key])
            split = f"; {count['split']:,} were split into {count['pieces']:,}" if count["split"] else ""
            lines.append(f"data: {name}: {kept}{gone}{split}")
        return lines

    def tokens(self, document: int, begin: int, end: int) -> np.ndarray:
        """Tokens begin to end of a document: a view."""
        values, offsets, _, row = self._find(document)
        return values[offsets[row] + begin : offsets[row] + end]

    def mask(self, document: int, begin: int, end: int) -> np.ndarray:
        """Which of them are to be learnt."""
        _, _, masks, row = self._find(document)
        if not masks[row].is_valid:
            return np.ones(end - begin, bool)
        return masks[row].values[begin:end].to_numpy(zero_copy_only=False)

    def _find(self, document: int) -> tuple[np.ndarray, np.ndarray, Any, int]:
        row = int(self._rows[document])
        chunk = int(np.searchsorted(self._first, row, "right")) - 1
        return *self._chunks[chunk], row - int(self._first[chunk])


def _documents(source: Source, tokenizer: Tokenizer, count: dict[str, int]) -> Iterator[Document]:
    """The documents of a source that are kept; what became of each record is added to `count`."""
    taken = 0
    for where, record in records(source):
        try:
            whole = document(record, source, tokenizer)
            learnt, short = targets(whole) > 0, len(whole.tokens) < (source.min_tokens or 0)
            pieces = shorten(whole, source) if learnt and not short else []
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not pieces:
            count["empty" if not learnt else "short" if short else "long"] += 1
            continue
        kept = [piece for piece in pieces if targets(piece)]
        if len(pieces) > 1:
            count["split"] += 1
            count["pieces"] += len(kept)
            count["bare"] += len(pieces) - len(kept)
        yield from kept
        taken += 1
        if taken == source.limit:
            return


def _write(sources: list[Source], tokenizer: Tokenizer, path: Path, digest: str) -> None:
    file, part = path / f"{digest[:16]}.arrow", path / f"{digest[:16]}.arrow.part"
    rows = Rows(part, tokenizer.vocab_size, FLUSH)
    counts = [dict.fromkeys([*KEPT, *LEFT_OUT, "split", "pieces"], 0) for _ in sources]
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        bar = tqdm(_documents(source, tokenizer, count), desc=f"prepare {source.label}", unit=" documents", delay=1)
        for made in bar:
            supervised = targets(made)
            rows.add(made, supervised, number)
            for key, value in zip(KEPT, (1, len(made.tokens), supervised), strict=True):
                count[key] += value
        if not count["documents"]:
            gone = ", ".join(f"{count[key]} {key}" for key in LEFT_OUT if count[key] or key == "empty")
            mend = "; lower data.source.min_tokens" if count["short"] else ""
            raise ValueError(f"data.source.path {source.path!r}: no document with a token to learn ({gone}){mend}")
    rows.close()
    part.replace(file)
    meta = {"layout": LAYOUT, "digest": digest, "file": file.name, "bytes": file.stat().st_size, "counts": counts,
            "names": [source.label for source in sources], "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size, "sources": [source.settings for source in sources]}  # fmt: skip
    _write_meta(path, meta)
    for old in path.glob("[0-9a-f]" * 16 + ".arrow"):
        if old != file:
            old.unlink()


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    part = path / "prepared.json.part"
    part.write_text(json.dumps(meta, indent=1))
    part.replace(path / "prepared.json")


def _read_meta(path: Path) -> dict[str, Any] | None:
    """What a folder holds, or None if that is not there whole, or laid out otherwise than now."""
    try:
        meta = json.loads((path / "prepared.json").read_text())
        whole = meta["layout"] == LAYOUT and (path / meta["file"]).stat().st_size == meta["bytes"]
        return meta if whole else None
    except (OSError, ValueError, KeyError):
        return None


def _digest(sources: list[Source], tokenizer: Tokenizer) -> str:
    total = hashlib.sha256()
    total.update(json.dumps([LAYOUT, tokenizer.fingerprint, tokenizer.vocab_size]).encode())
    for source in sources:
        total.update(json.dumps(source.settings).encode())
        if source.callable:
            total.update(hashlib.sha256(load_function(source.format)[1]).digest())
        if source.template == "tokenizer":
            total.update(hashlib.sha256(load_template(tokenizer.name)[0].encode()).digest())
        total.update(_contents(source).encode())
    return total.hexdigest()


def _contents(source: Source) -> str:
    """Equal where the contents of a source are."""
    if source.is_hub:  # of a revision of the data set, and of how it was read
        return str(data_set(source)._fingerprint)
    total = hashlib.sha256()
    for file in source.files():
        pair = [file, file.with_suffix(".bin")] if source.format == "binidx" else [file]
        for each in filter(Path.is_file, pair):
            one = hashlib.sha256()
            with each.open("rb") as stream:
                while block := stream.read(1 << 20):
                    one.update(block)
            total.update(one.digest())
    return total.hexdigest()
