"""Files become documents exactly, or an error that names the place; what was prepared is known by its digest."""

import json

import numpy as np
import pytest

from infctx.documents import ArrowDocuments, Source, prepare
from infctx.tokenizer import ByteTokenizer

TEXTS = ["Zwölf Boxkämpfer", "a", "", "line\nbreak\r\n", "日本語 🐢" * 1000]


def tokens(documents):
    return [documents.tokens(i, 0, int(n) + 1).tolist() for i, n in enumerate(documents.inputs)]


def expected():
    return [[b + 1 for b in text.encode()] + [0] for text in TEXTS if text]


def texts(folder):
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return folder


def test_text_files(tmp_path):
    texts(tmp_path / "in")
    for path in (tmp_path / "in", tmp_path / "in" / "*.txt"):
        documents = prepare(Source(str(path)), ByteTokenizer(), tmp_path / "out")
        assert tokens(documents) == expected()
        assert documents.left_out == 1  # the empty one
        assert documents.supervised.tolist() == documents.inputs.tolist()
        assert documents.mask(1, 0, 2).tolist() == [True, True]


def test_jsonl(tmp_path):
    lines = [json.dumps({"body": text, "other": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    documents = prepare(Source(str(tmp_path / "in.jsonl"), "jsonl", "body"), ByteTokenizer(), tmp_path / "out")
    assert tokens(documents) == expected()


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    assert tokens(prepare(Source(str(tmp_path / "a.txt")), ByteTokenizer(), tmp_path / "out")) == [[98, 99, 0]]


def test_prepared_once_and_again_when_stale(tmp_path, capsys):
    source = Source(str(texts(tmp_path / "in")))
    digests = []
    for change in (lambda: 0, lambda: 0, lambda: (tmp_path / "in" / "1.txt").write_text("b"), lambda: 0):
        change()
        digests.append(prepare(source, ByteTokenizer(), tmp_path / "out").digest)
    printed = [x for x in capsys.readouterr().out.splitlines() if "digest" in x]
    assert [("up to date" in x, "stale" in x) for x in printed] == [
        (False, False), (True, False), (False, True), (False, False), (True, False),
    ]  # fmt: skip
    assert digests[0] == digests[1] != digests[2] == digests[3]
    assert digests[0][:16] in printed[0]
    assert len(list((tmp_path / "out").glob("*.arrow"))) == 1


def test_settings_are_part_of_the_digest(tmp_path):
    (tmp_path / "a").write_text('{"text": "x", "b": "y"}\n')
    one = prepare(Source(str(tmp_path / "a"), "jsonl"), ByteTokenizer(), tmp_path / "out")
    two = prepare(Source(str(tmp_path / "a"), "jsonl", "b"), ByteTokenizer(), tmp_path / "out")
    assert (tokens(one)[0], tokens(two)[0]) == ([121, 0], [122, 0]) and one.digest != two.digest


def test_damaged_cache_is_made_again(tmp_path):
    source = Source(str(texts(tmp_path / "in")))
    prepare(source, ByteTokenizer(), tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="infctx prepare"):
        ArrowDocuments.open(tmp_path / "out")
    assert tokens(prepare(source, ByteTokenizer(), tmp_path / "out")) == expected()


def test_many_flushes_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("infctx.documents.FLUSH", 50)
    random = np.random.default_rng(0)
    lines = ["x" * int(n) for n in random.integers(1, 90, 200)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in lines))
    documents = prepare(Source(str(tmp_path / "a.jsonl"), "jsonl"), ByteTokenizer(), tmp_path / "out")
    assert documents.inputs.tolist() == [len(x) for x in lines]
    some = documents.subset(np.array([150, 3]))
    assert some.inputs.tolist() == [len(lines[150]), len(lines[3])]
    assert some.tokens(0, 0, 3).tolist() == documents.tokens(150, 0, 3).tolist()


BAD = {
    "text": [
        (b"ok\xff\xfe", "byte 2 (0xff) is not UTF-8"),
        (b"", "no document with a token to learn (1 empty)"),
    ],
    "jsonl": [
        (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2: no key 'text'; found: list"),
        (b'{"tex": "a"}', "line 1: no key 'text'; found: 'tex'"),
        (b'{"text": null}', "'text' must be a string, got NoneType"),
        (b'{"text": "\\ud800"}', "line 1: the text holds a lone surrogate"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not JSON in UTF-8"),
        (b"\n\n", "no document with a token to learn (0 empty)"),
    ],
}


@pytest.mark.parametrize(("kind", "content", "message"), [(k, *row) for k, rows in BAD.items() for row in rows])
def test_bad_files_are_named_and_nothing_is_left(tmp_path, kind, content, message):
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare(Source(str(tmp_path / "in"), kind), ByteTokenizer(), tmp_path / "out")
    assert message in str(error.value) and str(tmp_path / "in") in str(error.value)
    with pytest.raises(ValueError):
        ArrowDocuments.open(tmp_path / "out")


def test_missing_files():
    with pytest.raises(FileNotFoundError, match=r"data.source.path 'nowhere/\*': no such file"):
        Source("nowhere/*").files()


def test_unknown_format():
    with pytest.raises(ValueError, match="choose one of: text, jsonl"):
        Source("x", "xml")
