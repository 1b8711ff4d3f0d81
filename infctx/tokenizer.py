"""Text to token ids and back. Id 0 ends a document, in every tokenizer."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

END_OF_DOCUMENT = 0


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    name: str  # as a recipe gives it
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without an end-of-document token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not valid UTF-8 becomes U+FFFD."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """As `decode`, piece by piece, never breaking a character; ends with what was left over."""


class ByteTokenizer:
    """257 ids: 0 ends a document, byte b is b + 1, as in the first rows of the World vocabulary."""

    name, vocab_size = "bytes", 257

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, each plus one, as (n,) uint16."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-document tokens give nothing."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids, a piece for each that completes a character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if token != END_OF_DOCUMENT and (piece := decoder.decode(bytes([token - 1]))):
                yield piece
        if rest := decoder.decode(b"", True):
            yield rest


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a recipe names. Raises: ValueError if there is none of that name."""
    if name != ByteTokenizer.name:
        raise ValueError(f"tokenizer {name!r} is not known; choose: {ByteTokenizer.name}")
    return ByteTokenizer()
