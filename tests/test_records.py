"""Every kind of file gives the same records, compressed or not; what is damaged is named, with the place and a mend."""

import bz2
import csv
import gzip
import json
import lzma
import struct

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from infctx.binidx import HEAD, MAGIC
from infctx.documents import prepare
from infctx.records import records
from infctx.sources import Source
from infctx.tokenizer import ByteTokenizer

ROWS = [{"prompt": "a,\"b\"\nc", "completion": "Zwölf 🐢"}, {"prompt": "007", "completion": ""},
        {"prompt": "x" * 200_000, "completion": "tab\there"}] * 50  # fmt: skip


def as_csv(rows, mark):
    def write(file):
        with file.open("w", newline="", encoding="utf-8") as stream:
            lines = csv.writer(stream, delimiter=mark)
            lines.writerow(rows[0])
            lines.writerows(row.values() for row in rows)

    return write


def as_arrow(rows, new):
    def write(file):
        table = pa.Table.from_pylist(rows)
        with new(str(file), table.schema) as stream:
            stream.write_table(table, max_chunksize=40)

    return write


def writers(rows):
    """Suffix to what writes the rows."""
    return {
        ".jsonl": lambda file: file.write_text("\n".join(json.dumps(row) for row in rows), "utf-8"),
        ".json": lambda file: file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8"),
        ".csv": as_csv(rows, ","),
        ".tsv": as_csv(rows, "\t"),
        ".parquet": lambda file: parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=40),
        ".arrow": as_arrow(rows, pa.ipc.new_file),
        ".feather": as_arrow(rows, pa.ipc.new_stream),
    }


PACK = {
    "": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", writers(ROWS))
def test_every_kind_gives_the_same_records(tmp_path, suffix, packing):
    plain = tmp_path / f"plain{suffix}"
    writers(ROWS)[suffix](plain)
    file = tmp_path / f"packed{suffix}{packing}"
    file.write_bytes(PACK[packing](plain.read_bytes()))
    found = list(records(Source(str(file), "completion")))
    assert [record for _, record in found] == ROWS
    assert found[2][0].startswith(f"{file}, ") and len({where for where, _ in found}) == len(ROWS)


@pytest.mark.parametrize("packing", PACK)
def test_text_is_a_record(tmp_path, packing):
    file = tmp_path / f"book.txt{packing}"
    file.write_bytes(PACK[packing]("\ufeffZwölf\r\n🐢".encode() * 3))
    ((where, record),) = records(Source(str(file)))
    assert (where, record) == (str(file), {"text": "Zwölf\r\n🐢" + "\ufeffZwölf\r\n🐢" * 2})


def test_a_file_is_a_document_of_format_text_unless_a_column_is_named(tmp_path, caplog):
    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    assert [r for _, r in records(Source(str(tmp_path / "a.json"), "text"))] == [{"text": '[{"text": "x"}]'}]
    assert [r for _, r in records(Source(str(tmp_path / "a.json"), column="text"))] == [{"text": "x"}]
    assert len(caplog.records) == 1 and "1 such as a.json are read whole, each as a document" in caplog.text
    parquet.write_table(pa.table({"text": ["y"]}), tmp_path / "a.parquet")
    assert [r for _, r in records(Source(str(tmp_path / "a.parquet")))] == [{"text": "y"}]


TEXT = ", or data.source.format: text to read the file as one text"
UNTOLD = [
    ("a.csv", b"title,text\na,b\n", "a table with columns title, text: say data.source.column: text"),
    ("a.tsv", b"a\tb\nx\ty\n", "a table with columns a, b: say data.source.column: a"),
    ("a.csv.gz", gzip.compress(b"a,b,c,d,e,f\n1,2,3,4,5,6\n"), "a table with columns a, b, c, d, e, ...: say"),
    ("a.csv", b"a,b\n", "a table with columns none that are named: say data.source.column: NAME"),
    ("a.jsonl", b'{"messages": []}', "records with keys messages: say data.source.format: messages"),
    ("a.jsonl", b'{"id": 1, "conversations": []}', "records with keys id, conversations: say data.source.format: mes"),
    ("a.ndjson", b'{"completion": "", "prompt": ""}', "records with keys completion, prompt: say data.source.format"),
    ("a.json", b'[{"output": "", "instruction": ""}]', "instruction: say data.source.format: instruction"),
    ("a.json", b'[{"n": 1, "body": "x"}]', "records with keys n, body: say data.source.column: body"),
    ("a.json", b'{"n": 1}', "a.json: no list of records: name the key that holds it in data.source.key"),
    ("a.csv.gz", gzip.compress(b"a,b\n" * 999)[:20], "cannot be read to its end"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNTOLD)
def test_files_of_records_are_not_read_as_text_unless_that_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError) as error:
        next(records(Source(str(tmp_path))))
    said = str(error.value)
    assert said.startswith(f"{tmp_path / name}") and message in said and said.endswith(TEXT) and "\n" not in said
    if "gz" not in name:
        whole = [record["text"] for _, record in records(Source(str(tmp_path), "text"))]
        assert whole == [content.decode(), "text"]
    assert Source("x").settings == Source("x", "text").settings  # nothing that was prepared is stale by it


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_json_lists_whatever_the_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr("infctx.jsonstream.BLOCK", block)
    rows = [{"text": 'ä\\"]},{', "n": [1, {"a": None}]}, {}, {"text": "b", "x": -1.5e3}]
    head = json.dumps({"version": "1, [", "other": [[1], {"data": 2}]})[:-1]
    whole = f' \n{head}, "data" : {json.dumps(rows)}, "after": 1}}'
    for content, key in ((json.dumps(rows, indent=2), None), (whole, "data"), ("[ ]", None), ('{"a":[]}', "a")):
        (tmp_path / "a.json").write_text(content)
        found = [r for _, r in records(Source(str(tmp_path / "a.json"), "messages", key=key))]
        assert found == ([] if len(content) < 10 else rows)


def test_saved_data_sets_and_data_sets_by_name(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": f"row {i}"} for i in range(200)]
    one = datasets.Dataset.from_list(rows)
    one.select(range(100)).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([3, 1])).save_to_disk(tmp_path / "several")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def read(path, **options):
        return [record for _, record in records(Source(str(path), column="text", **options))]

    assert read(tmp_path / "one") == rows[:100]
    assert read(tmp_path / "several", split="test") == [rows[3], rows[1]]
    assert read(f"hf:{tmp_path}/hub") == rows
    for path, options, message in (
        (tmp_path / "several", {}, "data.source.split is missing; .*several holds: train, test"),
        (tmp_path / "several", {"split": "dev"}, "data.source.split 'dev' is not there"),
        (f"hf:{tmp_path}/hub", {"split": "dev"}, "cannot be loaded: .*check path, subset and split"),
        (f"hf:{tmp_path}/hub", {"subset": "x"}, "cannot be loaded"),
        (f"hf:{tmp_path}/nothing", {}, "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, **options)
    digests = []
    for last in (rows[-1], {"text": "another"}):
        (tmp_path / "hub" / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows[:-1], last])))
        digests += [prepare(Source(f"hf:{tmp_path}/hub"), ByteTokenizer(), tmp_path / "out").digest for _ in range(2)]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def pair(folder, documents, code=8, kind=np.uint16, sequences=None):
    """A pair as Megatron writes it: sequences, and which of them begin a document."""
    sequences = documents if sequences is None else sequences
    sizes = np.array([len(x) for x in sequences], np.int32)
    places = np.cumsum([0, *sizes[:-1]]).astype(np.int64) * np.dtype(kind).itemsize
    borders = np.arange(len(sizes) + 1) if sequences is documents else np.array(documents)
    head = HEAD.pack(MAGIC, 1, code, len(sizes), len(borders))
    (folder / "x.idx").write_bytes(head + sizes.tobytes() + places.tobytes() + borders.astype(np.int64).tobytes())
    (folder / "x.bin").write_bytes(np.concatenate([np.array(x, kind) for x in sequences]).tobytes())
    return folder / "x.idx"


@pytest.mark.parametrize(("code", "kind"), [(8, np.uint16), (4, np.int32), (5, np.int64), (1, np.uint8)])
def test_binidx(tmp_path, code, kind):
    documents = [[5, 6, 0], [7, 0], [0], [9, 8, 7, 6]]
    file = pair(tmp_path, documents, code, kind)
    for path in (file, file.with_suffix(".bin"), file.with_suffix(""), tmp_path, tmp_path / "*.idx"):
        found = prepare(Source(str(path), "binidx"), ByteTokenizer(), tmp_path / "out")
        assert [found.tokens(i, 0, int(n) + 1).tolist() for i, n in enumerate(found.inputs)] == [
            x for x in documents if len(x) > 1
        ]


def test_binidx_documents_of_several_sequences(tmp_path):
    file = pair(tmp_path, [0, 2, 2, 3], sequences=[[1, 2], [3], [4, 5]])
    assert [x.tolist() for _, x in records(Source(str(file), "binidx"))] == [[1, 2, 3], [], [4, 5]]


def test_binidx_is_prepared_again_when_its_tokens_change(tmp_path):
    one = prepare(Source(str(pair(tmp_path, [[1, 2]])), "binidx"), ByteTokenizer(), tmp_path / "out")
    two = prepare(Source(str(pair(tmp_path, [[1, 3]])), "binidx"), ByteTokenizer(), tmp_path / "out")
    assert one.digest != two.digest and two.tokens(0, 0, 2).tolist() == [1, 3]


GOOD = b'{"text": "a"}\n'
PAIR = {"format": "completion"}
# name, content, settings of the source, message
BAD = [
    ("a.txt.gz", gzip.compress(b"long enough" * 99)[:-12], {}, "a.txt.gz: cannot be read to its end: Compressed file"),
    ("a.jsonl.gz", gzip.compress(GOOD * 999)[:40], {"format": "jsonl"}, "cannot be read to its end: "),
    ("a.jsonl.bz2", bz2.compress(GOOD * 999)[:40], {"format": "jsonl"}, "cannot be read to its end: "),
    ("a.jsonl.xz", lzma.compress(GOOD * 999)[:40], {"format": "jsonl"}, "cannot be read to its end: "),
    ("a.jsonl.zst", PACK[".zst"](GOOD * 999)[:20], {"format": "jsonl"}, "cannot be read to its end: "),
    ("a.txt.gz", b"not packed", {}, "a.txt.gz: cannot be read to its end: Not a gzipped file"),
    ("a.txt.zst", b"not packed", {}, "a.txt.zst: cannot be read to its end: "),
    ("a.txt.gz", gzip.compress(b"ok\xff"), {}, "a.txt.gz: byte 2 (0xff) is not UTF-8: save the file as UTF-8"),
    ("a.bin", b"\xff", {}, "a.bin: byte 0 (0xff) is not UTF-8: set data.source.format: binidx"),
    ("a.json", b'{"text": "a"}', PAIR, "a.json: no list of records: name the key that holds it in data.source.key"),
    ("a.json", b'{"a": 1, "b": []}', PAIR | {"key": "c"}, "no key 'c' (data.source.key); found: 'a', 'b'"),
    ("a.json", b"[1]", PAIR | {"key": "c"}, "no key 'c' (data.source.key); found: no object"),
    ("a.json", b'{"a": 1}', PAIR | {"key": "a"}, "a list must begin with [, found '1'"),
    ("a.json", b'[{"prompt": "a", "completion": "b"}, {]', PAIR, "a.json, after record 1: not JSON: "),
    (
        "a.json",
        b'[{"prompt": "a", "completion": "b"} {}]',
        PAIR,
        "after record 1: not JSON: expected , or ] and found '{'",
    ),
    ("a.json", b'[{"prompt": "a", "completion": "b"}', PAIR, "expected , or ] and found 'the end of the file'"),
    ("a.json", b'[{"prompt": "a', PAIR, "a.json: not JSON: Unterminated string"),
    ("a.json", b'[{"prompt": "\xff"}]', PAIR, "a.json, after record 0: not UTF-8: save the file as UTF-8"),
    ("a.json", b'["a"]', PAIR, "a.json, record 1: no key 'prompt'; found: str"),
    ("a.json", b"", PAIR, "a.json: no list of records"),
    (
        "a.csv",
        b"prompt,completion\na,b\nc\n",
        PAIR,
        "a.csv, line 3: 1 fields where the first line names 2: quote the text",
    ),
    ("a.csv", b'prompt,completion\na,"b"c\n', PAIR, "a.csv, line 2: "),
    ("a.csv", b'prompt,completion\na,"b\n', PAIR, "a.csv, line 2: unexpected end of data: mend the quotes"),
    ("a.csv", b"", PAIR, "a.csv: empty: its first line must name the columns"),
    ("a.csv", b"prompt,completion\n", PAIR, "no document with a token to learn (0 empty)"),
    (
        "a.csv",
        b"prompt,answer\na,b\n",
        PAIR,
        "a.csv, line 2: no key 'completion'; found: 'prompt', 'answer'",
    ),
    ("a.csv", b"prompt,completion\na,\xff\n", PAIR, "not UTF-8: save the file as UTF-8"),
    ("a.parquet", b"", {}, "a.parquet: not a whole Parquet file: "),
    ("a.parquet", b"PAR1 and nothing PAR1", {}, "a.parquet: not a whole Parquet file: "),
    ("a.arrow", b"", {}, "a.arrow: not a whole Arrow file: "),
    ("a.arrow", b"ARROW1\0\0 and nothing", {}, "a.arrow: not a whole Arrow file: "),
    ("a.arrow", b"nothing of the kind at all", {}, "a.arrow: not a whole Arrow file: "),
    ("a.jsonl", GOOD + b'{"text": 3}', {"format": "jsonl"}, "a.jsonl, line 2: 'text' must be a string, got int"),
    ("a.jsonl", b"[" * 100_000, {"format": "jsonl"}, "a.jsonl, line 1: not JSON in UTF-8"),
    ("a.jsonl", GOOD, {"format": "jsonl", "min_tokens": 9}, "no document with a token to learn (0 empty, 1 short)"),
    ("a.jsonl", GOOD * 2, {"format": "jsonl", "max_tokens": 2, "min_tokens": 2, "column": "text", "limit": 1}, None),
    ("a.txt", b"abcdef", {"max_tokens": 3}, "a.txt: 7 tokens are more than data.source.max_tokens (3): raise it"),
    ("a.txt", b"a", {"split": "test"}, "data.source.split is for data sets by name or saved by `datasets`"),
    ("a.jsonl", GOOD, {"format": "jsonl", "key": "a"}, "a.jsonl: data.source.key is for records in .json files"),
    ("a.csv", b"text\na\n", PAIR | {"key": "a"}, "a.csv: data.source.key is for records in .json files"),
    (
        "a.jsonl",
        b'{"text": "\\ud800"}',
        {"format": "jsonl"},
        "(U+D800, character 0), which is no character: mend the file",
    ),
    ("x.idx", b"nothing", {"format": "binidx"}, "x.idx: not the index of a binidx pair: it must begin with MMIDIDX"),
    (
        "x.idx",
        HEAD.pack(MAGIC, 2, 8, 0, 1),
        {"format": "binidx"},
        "version 2, kind of number 8: only integers in version 1",
    ),
    ("x.idx", HEAD.pack(MAGIC, 1, 6, 0, 1), {"format": "binidx"}, "kind of number 6"),
    ("x.idx", HEAD.pack(MAGIC, 1, 8, 9, 1), {"format": "binidx"}, "x.idx: 34 bytes where its head says 150"),
    (
        "x.idx",
        HEAD.pack(MAGIC, 1, 8, 0, 1) + struct.pack("<q", 3),
        {"format": "binidx"},
        "do not begin and end with its",
    ),
    ("x.idx", HEAD.pack(MAGIC, 1, 8, 0, 1) + bytes(8), {"format": "binidx"}, "x.idx: x.bin is missing"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    source = Source(str(tmp_path / name), **options)
    if message is None:
        assert len(prepare(source, ByteTokenizer(), tmp_path / "out")) == 1
        return
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(source, ByteTokenizer(), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert name in str(error.value) or "data.source.split" in str(error.value)
    assert not list((tmp_path / "out").glob("*.arrow*"))


def test_damaged_pairs(tmp_path):
    file = pair(tmp_path, [[1, 2], [3, 256]])
    source = Source(str(file), "binidx")
    with pytest.raises(ValueError, match=r"x.idx, document 2: token id 300 is not of tokenizer bytes \(0 to 256\)"):
        prepare(Source(str(pair(tmp_path, [[1, 2], [3, 300]])), "binidx"), ByteTokenizer(), tmp_path / "out")
    pair(tmp_path, [[1, 2], [3, 4]])
    file.with_suffix(".bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match=r"x.bin: 2 bytes are fewer than x.idx says: copy both files again"):
        prepare(source, ByteTokenizer(), tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no such pair of .idx and .bin"):
        prepare(source, ByteTokenizer(), tmp_path / "out")
