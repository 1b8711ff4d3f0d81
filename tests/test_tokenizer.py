"""Any bytes in, the same bytes out; World's ids are those of its own package; characters are never broken."""

import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

import infctx.tokenizer
from infctx.documents import Source, prepare
from infctx.tokenizer import ByteTokenizer, WorldTokenizer, load_tokenizer
from infctx.world import read_vocabulary, vocabulary_file

STRINGS = 100_000
WORDS = [
    "the",
    " import",
    "Hello",
    " naïve",
    "日本語",
    "Привет",
    "مرحبا",
    "🐢",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "\ufffd",
    "\x00",
    "\u2028",
]
SPACES = [" ", "  ", " " * 7, " " * 40, "\n", "\n\n", "\r\n", "\t", "\t\t\t", "\u3000", "\xa0"]
CODE = ["def f(x):", "    return", "!=", "===", "});", "</div>", "0x1F", "3.14159", "self.", "__init__", "#" * 20, "/*"]


def fragment(rng: random.Random, pieces: list[bytes]) -> str:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice((WORDS, SPACES, CODE)[kind])
    if kind < 5:
        return rng.choice(pieces).decode(errors="ignore")
    first, last = ((32, 127), (0, 0x800), (0x3000, 0xD800), (0xE000, 0x110000))[rng.randrange(4)]
    return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 6)))


def strings(count: int, seed: int, longest: int = 8) -> Iterator[str]:
    """Words, spaces, code, pieces of the vocabulary and characters of all planes, side by side."""
    rng, pieces = random.Random(seed), read_vocabulary()
    for _ in range(count):
        yield "".join(fragment(rng, pieces) for _ in range(rng.randrange(longest)))


@pytest.fixture(scope="module")
def fast():
    tokenizer = WorldTokenizer()
    if tokenizer._rust is None:
        pytest.skip("the package pyrwkv-tokenizer is not installed")
    return tokenizer


@pytest.fixture(scope="module")
def slow():
    return WorldTokenizer(fast=False)


@pytest.fixture(scope="module")
def trie():
    return TRIE_TOKENIZER(str(vocabulary_file()))


def test_world_equals_the_rwkv_package_on_text(fast, trie):
    for text in strings(STRINGS, seed=0):
        ids = fast.encode(text).tolist()
        assert ids == trie.encode(text), repr(text)
        assert fast.decode(ids) == text


def test_pure_python_equals_rust(fast, slow):
    for text in strings(STRINGS, seed=1):
        assert slow.encode(text).tolist() == fast.encode(text).tolist(), repr(text)


def test_world_equals_the_rwkv_package_on_bytes(fast, slow, trie):
    rng, pieces = random.Random(2), read_vocabulary()
    for i in range(20_000):
        data = rng.randbytes(rng.randrange(40)) if i % 2 else b"".join(rng.choices(pieces, k=5))[rng.randrange(4) : -1]
        ids = slow.encode(data).tolist()
        assert ids == trie.encodeBytes(data) == fast.encode(data).tolist(), data
        assert slow.decode_bytes(ids) == data
        assert slow.decode(ids) == data.decode(errors="replace")


def test_blocks_are_not_seen(fast, slow, monkeypatch):
    monkeypatch.setattr(infctx.tokenizer, "BLOCK", 300)
    for text in [*strings(200, seed=3, longest=300), "-" * 5000, "🐢" * 1000, " \u0301" * 1000]:
        assert np.array_equal(fast.encode(text), slow.encode(text)), repr(text)


def test_no_token_goes_from_inside_one_character_into_the_next():
    inside = [piece for piece in read_vocabulary() if piece and 0x80 <= piece[0] < 0xC0]
    assert len(inside) > 64
    assert not [piece for piece in inside if any(not 0x80 <= byte < 0xC0 for byte in piece)]


def test_world_facts(fast, slow):
    assert (fast.name, fast.vocab_size, fast.end_of_document) == ("world", 65530, 0)
    assert (
        slow.encode("Hello 🐢").tolist()
        == fast.encode(b"Hello \xf0\x9f\x90\xa2").tolist()
        == [33155, 33, 3319, 145, 163]
    )
    assert (
        fast.encode("").dtype
        == fast.encode("abc").dtype
        == slow.encode("").dtype
        == slow.encode("a").dtype
        == np.uint16
    )
    assert fast.decode([33155, 0, 34]) == "Hello!"
    assert fast.decode([33155, 65530, 65535, 34]) == "Hello\ufffd\ufffd!"  # rows of the model without a token
    assert fast.decode(np.array([33155, 34], np.uint16)) == "Hello!"


def test_without_the_rust_package(monkeypatch, slow):
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    assert WorldTokenizer().encode("Hello 🐢").tolist() == slow.encode("Hello 🐢").tolist()


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    for text in strings(1000, seed=4):
        ids = tokenizer.encode(text)
        assert ids.tolist() == [b + 1 for b in text.encode()] == tokenizer.encode(text.encode()).tolist()
        assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode_bytes(tokenizer.encode(bytes(range(256)))) == bytes(range(256))


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_stream_waits_for_whole_characters(name):
    tokenizer = load_tokenizer(name)
    half = tokenizer.encode("é🐢".encode()[:4])
    assert "".join(tokenizer.stream([*half, 0])) == "é\ufffd"
    for text in strings(300, seed=5):
        ids, text = tokenizer.encode(text.replace("\ufffd", "")).tolist(), text.replace("\ufffd", "")
        assert "".join(tokenizer.stream(ids)) == text
        assert not any("\ufffd" in piece for piece in tokenizer.stream(ids))
        for cut in range(len(ids)):
            *whole, last = *tokenizer.stream(ids[:cut]), ""
            assert "".join(whole) + last == tokenizer.decode(ids[:cut])
            assert text.startswith("".join(whole).removesuffix("\ufffd"))


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_errors(name):
    tokenizer = load_tokenizer(name)
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D83D, character 2\)"):
        tokenizer.encode("ab\ud83d")
    for token in (-1, 1 << 16):
        with pytest.raises(ValueError, match=f"tokenizer {name}: there is no token id {token} "):
            tokenizer.decode([token])
        with pytest.raises(ValueError, match="there is no token id"):
            list(tokenizer.stream([token]))


@pytest.mark.parametrize("name", ["words", "wrold", "/no/such/tokenizer.json", "a/"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"tokenizer '{name}' is not known; choose: bytes, world, a tokenizer.json, "):
        load_tokenizer(name)


def test_prepare_with_world(tmp_path, slow):
    text = "".join(strings(500, seed=6)).replace("\r", "")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    source = Source(str(tmp_path / "a.txt"))
    documents = prepare(source, load_tokenizer("world"), tmp_path / "out")
    tokens = documents.tokens(0, 0, int(documents.inputs[0]) + 1)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [*slow.encode(text).tolist(), 0]
    assert prepare(source, ByteTokenizer(), tmp_path / "out").digest != documents.digest
