"""Tokens as text in which everything shows: what is learnt, borders, special tokens, halves of characters, controls."""

import unicodedata
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from rich.text import Text

from infctx.tokenizer import ByteExact, Tokenizer

LEARNT, READ, BORDER, NOTE = "green", "bright_black", "bold cyan", "italic"
MARKS = {"segment": "│", "window": "║"}
OPEN, CLOSE = "⟦", "⟧"  # around what is learnt, where there are no colours
HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # categories of characters that would not show, or move others


class Piece(NamedTuple):
    """Tokens begin to end, which make whole characters together, or one that does not."""

    begin: int
    end: int
    text: str
    special: bool = False


def pieces(ids: list[int], tokenizer: Tokenizer, whole: set[int]) -> Iterator[Piece]:
    """Text in as many pieces as can be, each of whole characters.

    Args:
        whole: places in front of which a piece must end: a character that goes on behind one is taken apart.
    """
    read = 0

    def feed() -> Iterator[int]:
        nonlocal read
        for token in ids:
            read += 1
            yield token

    done = 0
    for text in tokenizer.stream(feed()):
        while done < read - 1 and _is_special(ids[done], tokenizer):  # they have no text, and stood before it
            yield _single(done, ids, tokenizer)
            done += 1
        cut = any(i in whole or _is_special(ids[i], tokenizer) for i in range(done + 1, read))
        if cut or "\ufffd" in text:
            yield from _apart(done, read, ids, tokenizer, whole)
        else:
            yield Piece(done, read, text)
        done = read
    yield from (_single(i, ids, tokenizer) for i in range(done, len(ids)))


def _apart(begin: int, end: int, ids: list[int], tokenizer: Tokenizer, whole: set[int]) -> Iterator[Piece]:
    """Bytes between the places that must be kept apart, or the tokens' ids where a tokenizer tells no bytes."""
    if not isinstance(tokenizer, ByteExact):
        yield from (_single(i, ids, tokenizer) for i in range(begin, end))
        return
    cuts = [begin, *(i for i in range(begin + 1, end) if i in whole or _is_special(ids[i], tokenizer)
                     or _is_special(ids[i - 1], tokenizer)), end]  # fmt: skip
    for a, b in pairwise(cuts):
        if _is_special(ids[a], tokenizer):
            yield _single(a, ids, tokenizer)
        else:
            yield Piece(a, b, tokenizer.decode_bytes(ids[a:b]).decode("utf-8", "backslashreplace"))


def _single(i: int, ids: list[int], tokenizer: Tokenizer) -> Piece:
    if ids[i] == tokenizer.end_of_document:
        return Piece(i, i + 1, "⟨end⟩", True)
    text = tokenizer.decode([ids[i]])
    shown = text and "\ufffd" not in text
    return Piece(i, i + 1, text if shown else f"⟨{ids[i]}⟩", not shown)


def _is_special(token: int, tokenizer: Tokenizer) -> bool:
    """Two of it, since some tokenizers drop the space that a text begins with."""
    return token == tokenizer.end_of_document or not tokenizer.decode([token, token])


def visible(text: str) -> str:
    """A text whose every character shows; a line ends with a mark."""
    return "".join(
        "↵\n" if x == "\n" else "→\t" if x == "\t" else
        x.encode("unicode_escape").decode() if unicodedata.category(x) in HIDDEN else x for x in text
    )  # fmt: skip


def add_tokens(
    out: Text, ids: np.ndarray, learnt: np.ndarray, borders: dict[int, str], tokenizer: Tokenizer, colours: bool
) -> None:
    """Append tokens to a text.

    Args:
        ids, learnt: (n,) the tokens, and which of them are learnt.
        borders: what begins in front of a token, by its place: a segment or a window.
        colours: say by them what is learnt; else by brackets.
    """
    turns = set((np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist())
    parts, inside = list[tuple[str, str]](), False
    for piece in pieces(ids.tolist(), tokenizer, turns | set(borders)):
        now = bool(learnt[piece.begin])
        if inside and not now:
            parts.append((CLOSE, ""))
        if piece.begin in borders:
            parts.append((MARKS[borders[piece.begin]], BORDER))
        if now and not inside:
            parts.append((OPEN, ""))
        inside, style = now, LEARNT if now else READ
        parts.append((piece.text, f"{style} reverse") if piece.special else (visible(piece.text), style))
    if inside:
        parts.append((CLOSE, ""))
    for style, run in groupby((x for x in parts if x[1] or not colours), lambda x: x[1]):
        out.append("".join(text for text, _ in run), style)
