"""Tokens as Megatron and RWKV-LM keep them: NAME.bin, and an index NAME.idx of the documents in it. Memory-mapped."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")  # magic, version, kind of number, sequences, borders of documents
KINDS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def documents(index: Path) -> Iterator[np.ndarray]:
    """The tokens of each document, (n,) of the file's own integers: a view where its sequences lie end to end.

    Raises: ValueError naming the file that is missing or damaged.
    """
    sizes, places, borders, kind = _index(index)
    file = index.with_suffix(".bin")
    if not file.is_file():
        raise ValueError(f"{index}: {file.name} is missing: the two belong together, put it there")
    width, held = np.dtype(kind).itemsize, file.stat().st_size
    if len(sizes) and (int((places + sizes.astype(np.int64) * width).max()) > held or int(places.min()) < 0):
        raise ValueError(f"{file}: {held} bytes are fewer than {index.name} says: copy both files again")
    data = np.memmap(file, np.uint8, "r") if held else np.empty(0, np.uint8)
    for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        begin, size = places[first:last], sizes[first:last].astype(np.int64) * width
        if len(begin) and (begin[1:] == begin[:-1] + size[:-1]).all():
            yield np.frombuffer(data[begin[0] : begin[-1] + size[-1]], kind)
        else:
            parts: list[np.ndarray] = [np.frombuffer(data[b : b + n], kind) for b, n in zip(begin, size, strict=True)]
            yield np.concatenate([np.empty(0, kind), *parts])


def _index(index: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, type]:
    """Of sequences: tokens, and where they begin in bytes; the first one of each document; the kind of number."""
    held = index.stat().st_size
    with index.open("rb") as stream:
        head = stream.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise ValueError(f"{index}: not the index of a binidx pair: it must begin with {MAGIC[:7].decode()}")
    _, version, code, sequences, borders = HEAD.unpack(head)
    if version != 1 or code not in KINDS:
        raise ValueError(f"{index}: version {version}, kind of number {code}: only integers in version 1 are read")
    ends = np.cumsum([HEAD.size, 4 * sequences, 8 * sequences, 8 * borders])
    if held < int(ends[-1]):
        raise ValueError(f"{index}: {held} bytes where its head says {int(ends[-1])}: copy the file again")
    data = np.memmap(index, np.uint8, "r")
    kinds = ("<i4", "<i8", "<i8")
    sizes, places, first = (np.frombuffer(data[a:b], k) for a, b, k in zip(ends[:-1], ends[1:], kinds, strict=True))
    steps = np.diff(first)
    if borders < 1 or first[0] != 0 or first[-1] != sequences or (steps < 0).any() or (len(sizes) and sizes.min() < 0):
        raise ValueError(f"{index}: its documents do not begin and end with its sequences: make the pair anew")
    return sizes, places, first, KINDS[code]
