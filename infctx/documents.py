"""From files to documents, and from documents to tokens on disk that are read a stretch at a time.

`prepare` writes one Arrow file and a `prepared.json` that names it and says what it was made from.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from infctx.segments import Document
from infctx.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LAYOUT = 1  # of the Arrow file; part of the digest
FLUSH = 1 << 22  # tokens held before they are written: bounds the memory of `prepare`


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        path: a file, a folder (all files in it) or a pattern such as books/*.txt.
        format: text: a file is a document; jsonl: a line is a document.
        column: jsonl: the key that holds the text.
    """

    path: str
    format: str = "text"
    column: str = "text"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"data.source.format {self.format!r} is not known; choose one of: {', '.join(FORMATS)}")

    def files(self) -> list[Path]:
        """The files, by name. Raises: FileNotFoundError if there is none."""
        whole, prepared = Path(self.path), "prepared.json"
        if whole.is_dir():  # without hidden files, and without what `prepare` itself put there
            found = [x for x in whole.rglob("*") if x.name[0] != "." and not (x.parent / prepared).exists()]
        else:
            found = [whole] if whole.is_file() else [Path(x) for x in glob(self.path, recursive=True)]  # noqa: PTH207 (absolute patterns too)
        files = sorted(file for file in found if file.is_file())
        if not files:
            raise FileNotFoundError(f"data.source.path {self.path!r}: no such file")
        return files


def prepare(source: Source, tokenizer: Tokenizer, path: str | Path) -> "ArrowDocuments":
    """Tokenise a source into `path`, or find that this was done with the same contents, tokenizer and settings.

    Raises: FileNotFoundError, or ValueError naming the file (and line) that cannot be used, or if nothing is left.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with FileLock(path / ".lock"):
        digest = _digest(source, tokenizer)
        meta = _read_meta(path)
        if meta and meta["digest"] == digest:
            print(f"data: {path} is up to date, digest {digest[:16]}")
        else:
            if meta:
                print(f"data: {path} is stale (digest {meta['digest'][:16]}): source, tokenizer or settings changed")
            try:
                _write(source, tokenizer, path, digest)
            except BaseException:
                (path / f"{digest[:16]}.arrow.part").unlink(missing_ok=True)
                raise
            print(f"data: prepared {path}, digest {digest[:16]}")
    return ArrowDocuments.open(path)


class ArrowDocuments:
    """Prepared documents, memory-mapped: a stretch of a long one costs only its own bytes.

    Attributes:
        inputs: (documents,) int64, tokens of each but its last; supervised: (documents,) int64, targets to be learnt.
        digest: of source, tokenizer and settings; left_out: documents without a target.
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
        self.digest, self.left_out = meta["digest"], meta["left_out"]

    @classmethod
    def open(cls, path: str | Path) -> "ArrowDocuments":
        """Raises: ValueError if the folder holds no whole prepared data."""
        from datasets import Dataset  # takes seconds to import

        meta = _read_meta(Path(path))
        if meta is None:
            raise ValueError(f"{path} holds no prepared data, or not all of it: run `infctx prepare` again")
        return cls(Dataset.from_file(str(Path(path, meta["file"]))).data, meta)

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, rows: np.ndarray) -> "ArrowDocuments":
        """Some of the documents, renumbered."""
        return ArrowDocuments(self._table, self._meta, self._rows[rows])

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


def _text(source: Source) -> Iterator[tuple[str, str]]:
    for file in source.files():
        try:
            yield str(file), file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            bad = f"byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8"
            raise ValueError(f"{file}: {bad}: save the file as UTF-8") from None


def _jsonl(source: Source) -> Iterator[tuple[str, str]]:
    for file in source.files():
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", _field(line, source.column, f"{file}, line {number}")


def _field(line: bytes, column: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ValueError(f"{where}: not JSON in UTF-8: {error}") from None
    if not isinstance(record, dict) or column not in record:
        found = ", ".join(map(repr, list(record)[:5])) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no key {column!r} (data.source.column); found: {found}")
    if not isinstance(record[column], str):
        raise ValueError(f"{where}: {column!r} must be a string, got {type(record[column]).__name__}")
    return record[column]


# format -> (where, text) of each document. A closing end-of-document token is added to the text.
FORMATS: dict[str, Callable[[Source], Iterator[tuple[str, str]]]] = {"text": _text, "jsonl": _jsonl}


def _document(text: str, where: str, tokenizer: Tokenizer) -> Document:
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{where}: {error}: mend the file") from None
    return Document(np.append(ids, ids.dtype.type(tokenizer.end_of_document)))


def _write(source: Source, tokenizer: Tokenizer, path: Path, digest: str) -> None:
    from datasets import Features, LargeList, Value
    from datasets.arrow_writer import ArrowWriter

    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    features = Features(
        {"tokens": LargeList(Value(dtype)), "mask": LargeList(Value("bool")), "supervised": Value("int64")}
    )
    file, part = path / f"{digest[:16]}.arrow", path / f"{digest[:16]}.arrow.part"
    kept = left_out = held = 0
    with ArrowWriter(path=str(part), features=features) as writer:
        for where, text in tqdm(FORMATS[source.format](source), desc="prepare", unit=" documents", delay=1):
            document = _document(text, where, tokenizer)
            mask = np.ones(len(document.tokens), bool) if document.mask is None else document.mask
            if not mask[1:].any():
                left_out += 1
                continue
            writer.write({"tokens": document.tokens, "mask": document.mask, "supervised": int(mask[1:].sum())})
            kept, held = kept + 1, held + len(document.tokens)
            if held > FLUSH:
                writer.write_examples_on_file()
                held = 0
        if kept:
            writer.finalize()
    if not kept:
        part.unlink(missing_ok=True)
        raise ValueError(f"data.source.path {source.path!r}: no document with a token to learn ({left_out} empty)")
    part.replace(file)
    meta = {"digest": digest, "file": file.name, "bytes": file.stat().st_size, "documents": kept, "left_out": left_out,
            "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "source": asdict(source)}  # fmt: skip
    part.write_text(json.dumps(meta, indent=1))
    part.replace(path / "prepared.json")
    for old in path.glob("[0-9a-f]" * 16 + ".arrow"):
        if old != file:
            old.unlink()


def _read_meta(path: Path) -> dict[str, Any] | None:
    """What a folder holds, or None if that is not there whole."""
    try:
        meta = json.loads((path / "prepared.json").read_text())
        return meta if (path / meta["file"]).stat().st_size == meta["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _digest(source: Source, tokenizer: Tokenizer) -> str:
    total = hashlib.sha256()
    settings = [LAYOUT, source.format, source.column, tokenizer.fingerprint, tokenizer.vocab_size]
    total.update(json.dumps(settings).encode())
    for file in source.files():
        one = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                one.update(block)
        total.update(one.digest())
    return total.hexdigest()
