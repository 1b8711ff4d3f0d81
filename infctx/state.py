"""What a model carries from token to token, as values that autograd sees.

N sequences, C channels, H heads of V value and K key channels. All in float32, float64 in a float64 model.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class BlockState(NamedTuple):
    """The state of one layer."""

    att_shift: Tensor  # (N, C) last input of time mixing
    ffn_shift: Tensor  # (N, C) last input of channel mixing
    wkv: Tensor  # (N, H, V, K)


class State(NamedTuple):
    """The state of a model: one BlockState per layer."""

    blocks: tuple[BlockState, ...]


def pack(state: State) -> Tensor:
    """All of a state as one (N, D) matrix, a row per sequence: what is stored at borders and chosen between."""
    return torch.cat([x.flatten(1) for block in state.blocks for x in block], 1)


def unpack(flat: Tensor, like: State) -> State:
    """The inverse of `pack`: a State of views into (N, D), shaped as `like` is (whose N may differ)."""
    shapes = [[x.shape[1:] for x in block] for block in like.blocks]
    parts = iter(flat.split([shape.numel() for block in shapes for shape in block], 1))
    return State(tuple(BlockState(*(next(parts).unflatten(1, shape) for shape in block)) for block in shapes))
