"""Bytes in, bytes out; characters are never broken."""

import random

import pytest

from infctx.tokenizer import ByteTokenizer, load_tokenizer


def test_round_trip():
    tokenizer = load_tokenizer("bytes")
    text = "".join(chr(random.Random(0).choice([65, 0xE9, 0x3042, 0x1F422])) for _ in range(1000)) + "\x00"
    ids = tokenizer.encode(text)
    assert ids.tolist() == [b + 1 for b in text.encode()]
    assert tokenizer.decode(ids.tolist()) == text


def test_stream_waits_for_whole_characters():
    ids = [b + 1 for b in "é🐢".encode()]
    assert list(ByteTokenizer().stream(ids)) == ["é", "🐢"]
    assert list(ByteTokenizer().stream([*ids[:3], 0])) == ["é", "�"]


def test_unknown_name():
    with pytest.raises(ValueError, match="tokenizer 'words' is not known"):
        load_tokenizer("words")
