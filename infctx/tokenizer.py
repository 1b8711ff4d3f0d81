"""Text to token ids and back: bytes, World, Hugging Face."""

import codecs
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Protocol

import numpy as np

from infctx.world import LongestMatch, read_vocabulary, vocabulary_file

log = logging.getLogger(__name__)

END_OF_DOCUMENT = 0  # of bytes and World
UNUSED = "\ufffd".encode()  # what a row of a World model that no token belongs to is shown as
BLOCK = 1 << 16  # characters encoded at a time: a list of ids takes 40 bytes a token


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    name: str  # as a recipe gives it
    vocab_size: int  # ids are 0 to vocab_size - 1; a model may have more rows
    end_of_document: int  # the id that ends a document
    fingerprint: str  # equal where the ids of any text are: part of the digest of prepared data

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text as (n,) uint16 or uint32, without an end of document. Raises: ValueError."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not valid UTF-8 becomes U+FFFD. Raises: ValueError if no model can have an id."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """As `decode`, piece by piece, never breaking a character; ends with what was left over."""


class ByteExact:
    """Each id stands for a piece of bytes, so that any bytes come back as they were. Id 0 is the empty piece."""

    name: str
    end_of_document = END_OF_DOCUMENT

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; an end of document gives none. Raises: ValueError for an id that there is no row for."""
        return b"".join(map(self._piece, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not valid UTF-8 becomes U+FFFD. Raises: as `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """As `decode`, a piece for each id that completes a character; ends with what was left over."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if piece := decoder.decode(self._piece(token)):
                yield piece
        if rest := decoder.decode(b"", True):
            yield rest

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < len(self._pieces):
            raise ValueError(f"tokenizer {self.name}: there is no token id {token} (0 to {len(self._pieces) - 1})")
        return self._pieces[token]


class ByteTokenizer(ByteExact):
    """257 ids: 0 ends a document, byte b is b + 1, as in the first rows of the World vocabulary."""

    name, vocab_size, fingerprint = "bytes", 257, "bytes"

    def __init__(self) -> None:
        super().__init__([b"", *(bytes([b]) for b in range(256))])

    def encode(self, text: str | bytes) -> np.ndarray:
        """The UTF-8 bytes of a text, each plus one, as (n,) uint16. Raises: ValueError for a lone surrogate."""
        return np.frombuffer(to_bytes(text), np.uint8).astype(np.uint16) + np.uint16(1)


class WorldTokenizer(ByteExact):
    """RWKV's World vocabulary: greedy longest match over bytes, 65,530 ids of which 0 ends a document.

    A model of it has 65,536 rows. The last six stand for nothing; they are shown as U+FFFD, so that what a model says
    can always be streamed.

    Args:
        fast: encode with the package pyrwkv-tokenizer where it is installed; the ids are the same without it.
    """

    name, vocab_size, fingerprint = "world", 65530, "world"

    def __init__(self, fast: bool = True) -> None:
        self._vocabulary, self._fast = read_vocabulary(), fast
        self._longest = max(map(len, self._vocabulary))
        super().__init__(self._vocabulary + [UNUSED] * (65536 - self.vocab_size))

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, or of any bytes, as (n,) uint16. Raises: ValueError for a lone surrogate."""
        data = to_bytes(text)
        if self._rust is None:
            return self._python.encode(data)
        try:
            text = data.decode()
        except UnicodeDecodeError:  # it reads text only
            return self._python.encode(data)
        return self._in_blocks(text, self._rust)

    def _in_blocks(self, text: str, encode: Callable[[str], list[int]]) -> np.ndarray:
        """The last tokens of a block could be others if it went on, so they are left to the next one."""
        parts, begin = [np.empty(0, np.uint16)], 0
        while begin < len(text):
            ids, end = encode(text[begin : begin + BLOCK]), begin + BLOCK
            if end < len(text):
                left = b""
                # No token goes from inside one character into the next, so a token that begins one is never far.
                while len(left) < self._longest or 0x80 <= left[0] < 0xC0:
                    left = self._vocabulary[ids.pop()] + left
                end -= len(left.decode())
            parts.append(np.array(ids, np.uint16))
            begin = end
        return np.concatenate(parts)

    @cached_property
    def _python(self) -> LongestMatch:
        return LongestMatch(self._vocabulary)

    @cached_property
    def _rust(self) -> Callable[[str], list[int]] | None:
        """Made when first needed, as it takes 0.7 s and 230 MB. Only encodes: its decoding fails on half characters."""
        if not self._fast:
            return None
        try:
            from pyrwkv_tokenizer import RWKVTokenizer
        except ImportError:
            log.info("tokenizer world: the package pyrwkv-tokenizer is not installed; encoding is eight times slower")
            return None
        return RWKVTokenizer(vocab_filepath=str(vocabulary_file())).encode


def to_bytes(text: str | bytes) -> bytes:
    """The UTF-8 of a text; bytes as they are. Raises: ValueError for half a surrogate pair."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X}, character {error.start}"
        raise ValueError(f"the text holds a lone surrogate ({bad}), which is no character") from None


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a recipe names: bytes, world, a tokenizer.json, a folder with one, or owner/name on the hub.

    Raises: ValueError if there is none of that name, or it cannot be used.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == WorldTokenizer.name:
        return WorldTokenizer()
    from infctx.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(name)
