"""From files and data sets to records, one after another: memory does not grow with the file.

A record is what a line, row or file holds, with words that say where it stands.
"""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from infctx import binidx
from infctx.jsonstream import JsonStream
from infctx.sources import HUB, Source

log = logging.getLogger(__name__)

Records = Iterator[tuple[str, Any]]  # (where it stands, what it holds)
BLOCK = 1 << 20  # bytes that are read together
ROWS = 16  # of a table that are read together: each may be a book
# Formats, and keys of a record that tell them.
TOLD = (("messages", {"messages"}), ("messages", {"conversations"}), ("completion", {"prompt", "completion"}),
        ("instruction", {"instruction", "output"}))  # fmt: skip
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)


def records(source: Source) -> Records:
    """All records of a source: a file of text is {"text": ...}, one of binidx the tokens.

    Raises: FileNotFoundError, or ValueError naming the file, the place in it and the mend.
    """
    if source.is_hub or (source.is_saved and source.format != "binidx"):
        yield from _rows(data_set(source).with_format("arrow").iter(ROWS), source.path)
        return
    if source.split is not None:
        raise ValueError("data.source.split is for data sets by name or saved by `datasets`: leave it out")
    files = source.files()
    whole = [file for file in files if _is_whole(file, source) and kind(file) in READ]
    if whole and not source.told:
        raise ValueError(_untold(whole[0], source))
    if whole and source.format == "text":
        log.warning(f"data.source {source.label}: {len(whole)} such as {whole[0].name} are read whole, each as a "
                    "document; to read a column of their records name it in data.source.column")  # fmt: skip
    for file in files:
        if source.key is not None and (kind(file) != ".json" or _is_whole(file, source)):
            raise ValueError(f"{file}: data.source.key is for records in .json files: leave it out")
        yield from _file(file, source)


def data_set(source: Source) -> Any:
    """The `datasets.Dataset` of a source that is one. Raises: ValueError if it cannot be had."""
    import datasets  # takes seconds to import

    try:
        if source.is_saved:
            found = datasets.load_from_disk(source.path)
        else:
            found = datasets.load_dataset(source.path.removeprefix(HUB), source.subset, split=source.split or "train")
    except Exception as error:  # the library raises whatever the hub, the network or a reader of files raises
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"data.source.path {source.path!r}: cannot be loaded: {why}: check path, subset and split"
        ) from None
    if isinstance(found, dict):
        if source.split not in found:
            given = "is missing" if source.split is None else f"{source.split!r} is not there"
            raise ValueError(f"data.source.split {given}; {source.path} holds: {', '.join(map(str, found))}")
        found = found[source.split]
    return found


def kind(file: Path) -> str:
    """The suffix that tells what a file holds, without that of its compression: .csv of table.csv.gz."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() in OPEN else file.suffix.lower()


def _is_whole(file: Path, source: Source) -> bool:
    """Whether a file is read by the format alone, whatever its suffix."""
    text = source.format == "text" and source.column is None and kind(file) not in TABLES
    return text or source.format in ("jsonl", "binidx")


def _untold(file: Path, source: Source) -> str:
    """Of a file of records, of which neither format nor column is told: what is in it, and what to say."""
    text = "or data.source.format: text to read the file as one text"
    try:
        with closing(_sound(READ[kind(file)], file, source)) as found:  # type: ignore[type-var]
            record = next(found, ("", None))[1]
    except ValueError as error:
        return f"{error}, {text}"
    record = record if isinstance(record, Mapping) else {}
    names = list(record)
    what = "a table with columns" if kind(file) in (".csv", ".tsv") else "records with keys"
    listed = ", ".join(names[:5])[:100] + (", ..." if len(names) > 5 else "") if names else "none that are named"
    mend = next((f"format: {name}" for name, keys in TOLD if keys <= set(names)), None)
    if mend is None:
        texts = [name for name in names if isinstance(record[name], str)] or ["NAME"]
        mend = f"column: {'text' if 'text' in texts else texts[0][:40]}"
    return f"{file}: {what} {listed}: say data.source.{mend}, {text}"


def _file(file: Path, source: Source) -> Records:
    own = {"binidx": _tokens, "jsonl": _lines, "text": _text}
    yield from _sound(own[source.format] if _is_whole(file, source) else READ.get(kind(file), _text), file, source)


def _sound(read: Callable[..., Records], file: Path, source: Source) -> Records:
    try:
        yield from read(file, source)
    except DAMAGED as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: cannot be read to its end: {why}: copy the file again") from None


def _zstd(file: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"), BLOCK)


OPEN: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def _open(file: Path) -> BinaryIO:
    return OPEN.get(file.suffix.lower(), lambda x: x.open("rb"))(file)


def _text(file: Path, _: Source) -> Records:
    with _open(file) as stream:
        content = stream.read()
    try:
        yield str(file), {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        bad = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8"
        mend = "set data.source.format: binidx" if file.suffix in (".idx", ".bin") else "save the file as UTF-8"
        raise ValueError(f"{file}: {bad}: {mend}") from None


def _lines(file: Path, _: Source) -> Records:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                    raise ValueError(f"{where}: not JSON in UTF-8: {error}: mend the line") from None
                yield where, record


def _json(file: Path, source: Source) -> Records:
    number = 0
    with _open(file) as stream:
        text = JsonStream(io.TextIOWrapper(stream, "utf-8-sig"))
        try:
            if source.key is not None:
                text.find(source.key)
            elif text.next() != "[":
                raise ValueError("no list of records: name the key that holds it in data.source.key, "
                                 "or read lines of JSON by format jsonl")  # fmt: skip
            for number, record in enumerate(text.items(), 1):
                yield f"{file}, record {number}", record
        except UnicodeDecodeError:
            raise ValueError(f"{file}, after record {number}: not UTF-8: save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            after = f", after record {number}" if number else ""
            raise ValueError(f"{file}{after}: {error}") from None


def _csv(file: Path, _: Source) -> Records:
    csv.field_size_limit((1 << 31) - 1)  # else a document has at most 131,072 characters
    with _open(file) as stream:
        lines = csv.reader(
            io.TextIOWrapper(stream, "utf-8-sig", newline=""),
            strict=True,
            delimiter="\t" if kind(file) == ".tsv" else ",",
        )
        begin = 1  # of the row that is read: a quote may hold lines
        try:
            names = next(lines, None)
            if names is None:
                raise ValueError(f"{file}: empty: its first line must name the columns")
            begin = lines.line_num + 1
            for row in lines:
                where, begin = f"{file}, line {lines.line_num}", lines.line_num + 1
                if not row:
                    continue
                if len(row) != len(names):
                    raise ValueError(
                        f"{where}: {len(row)} fields where the first line names {len(names)}: quote the text"
                    )
                yield where, dict(zip(names, row, strict=True))
        except UnicodeDecodeError:
            raise ValueError(f"{file}, after line {lines.line_num}: not UTF-8: save the file as UTF-8") from None
        except csv.Error as error:
            place = f"line {begin}" if begin >= lines.line_num else f"lines {begin} to {lines.line_num}"
            raise ValueError(f"{file}, {place}: {error}: mend the quotes") from None


def _parquet(file: Path, _: Source) -> Records:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with _seekable(file) as stream, parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False) as table:
            yield from _rows(table.iter_batches(ROWS), str(file))
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not a whole Parquet file: {_first(error)}: copy the file again") from None


def _arrow(file: Path, _: Source) -> Records:
    import pyarrow as pa

    try:
        with _seekable(file) as stream:
            if stream.read(6) == b"ARROW1":
                table = pa.ipc.open_file(stream)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:  # the other of the two layouts, which `datasets` writes
                stream.seek(0)
                batches = iter(pa.ipc.open_stream(stream))
            yield from _rows((part for batch in batches for part in _slices(batch, ROWS)), str(file))
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not a whole Arrow file: {_first(error)}: copy the file again") from None


def _tokens(file: Path, _: Source) -> Records:
    for number, tokens in enumerate(binidx.documents(file), 1):
        yield f"{file}, document {number}", tokens


def _rows(batches: Iterator[Any], name: str) -> Records:
    number = 0
    for batch in batches:
        for part in _slices(batch, max(1, len(batch) * BLOCK // max(1, batch.nbytes))):
            for record in part.to_pylist():
                number += 1
                yield f"{name}, record {number}", record


def _slices(batch: Any, rows: int) -> Iterator[Any]:
    return (batch.slice(i, rows) for i in range(0, len(batch), rows))


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@contextmanager
def _seekable(file: Path) -> Iterator[Any]:
    """A file that can be read anywhere: a compressed one is unpacked into a temporary one."""
    import pyarrow as pa

    if file.suffix.lower() not in OPEN:
        with pa.memory_map(str(file)) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as plain, _open(file) as packed:
        shutil.copyfileobj(packed, plain, BLOCK)
        plain.seek(0)
        yield plain


TABLES: dict[str, Callable[..., Records]] = {
    ".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow,
}  # fmt: skip
READ = TABLES | {".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
