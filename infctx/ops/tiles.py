"""Ragged sequences as tiles of LENGTH tokens: the layout that the chunked recurrences share."""

from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -1e38  # the exponent of an empty sum
# One length for all, so that a sequence's bits do not depend on its neighbours.
LENGTH = 32


class Tiles(NamedTuple):
    """How the tokens of N sequences fall into tiles: sequences sorted from the longest to the shortest."""

    source: Tensor  # (tiles * LENGTH,) row of the token in the flattened input; rows past the end are padding
    order: Tensor  # (N,) sequences, most tiles first
    steps: list[Tensor]  # steps[i]: the i-th tile of every sequence that has one (a prefix of `order`)
    sizes: Tensor  # (tiles,) tokens in each


def make_tiles(lengths: list[int], device: torch.device) -> Tiles:
    """Cut sequences of these lengths."""
    size = torch.tensor(lengths, dtype=torch.long)
    counts = -(-size // LENGTH)
    first = counts.cumsum(0) - counts
    token = size.cumsum(0) - size
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    begin = (torch.arange(len(sequence)) - first[sequence]) * LENGTH
    place = begin[:, None] + torch.arange(LENGTH)
    source = torch.where(place < size[sequence][:, None], token[sequence][:, None] + place, sum(lengths))
    order = counts.argsort(descending=True, stable=True)
    steps = [(first[order] + i)[counts[order] > i].to(device) for i in range(int(counts.max()) if len(lengths) else 0)]
    count = (size[sequence] - begin).clamp(max=LENGTH)
    return Tiles(source.flatten().to(device), order.to(device), steps, count.to(device))


def to_tiles(tensors: tuple[Tensor, ...], tiles: Tiles) -> list[Tensor]:
    """(tokens, ...) -> (tiles, L, ...), zeros in the padding."""
    rows = (torch.cat([x, x.new_zeros(1, *x.shape[1:])])[tiles.source] for x in tensors)
    return [x.unflatten(0, (-1, LENGTH)) for x in rows]


def to_head_tiles(tensors: tuple[Tensor, ...], tiles: Tiles) -> list[Tensor]:
    """(tokens, H, N) -> (tiles, H, L, N); a padded log decay of 0 and no input leave the state as it is."""
    return [x.transpose(1, 2).contiguous() for x in to_tiles(tensors, tiles)]


def to_tokens(x: Tensor, tiles: Tiles, total: int) -> Tensor:
    """(tiles, L, ...) -> (tokens, ...)."""
    rows = x.flatten(0, 1)
    return rows.new_empty(total + 1, *rows.shape[1:]).index_copy(0, tiles.source, rows)[:total]


def from_head_tiles(x: Tensor, tiles: Tiles, total: int) -> Tensor:
    """(tiles, H, L, N) -> (tokens, H, N)."""
    return to_tokens(x.transpose(1, 2), tiles, total)
