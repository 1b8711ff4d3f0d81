"""What a model carries from token to token, as values that autograd sees.

N sequences, C channels, H heads of V value and K key channels. All in float32, float64 in a float64 model.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Community files have the first one, for RWKV-5 and later, as (H, V, K).
TIME_STATE, SHIFT_STATE = "time_state", "shift_state"  # parameters of a mixer: what is learnt of its initial state


class BlockState(NamedTuple):
    """The state of one layer."""

    att_shift: Tensor  # (N, C) last input of time mixing
    ffn_shift: Tensor  # (N, C) last input of channel mixing
    wkv: Tensor  # (N, H, V, K); RWKV-4 (N, 3, C): numerator, denominator, max exponent; GOLD layers (N, 0)


class KeyMemory(NamedTuple):
    """GoldFinch: what its attention layers keep of the M tokens read so far, the sequences end to end."""

    tokens: Tensor  # (M,) int32
    keys: Tensor  # (M, R) compressed keys in the computing precision
    cu_seqlens: Tensor  # (N + 1,) int32
    added: Tensor | None = None  # (T, R) keys of the last call's tokens, in their order: those in `keys` are copies


class State(NamedTuple):
    """The state of a model: one BlockState per layer, and GoldFinch's memory, which grows."""

    blocks: tuple[BlockState, ...]
    memory: KeyMemory | None = None


class Relay(Protocol):
    """Brings a model its state layer by layer, and takes it on likewise: the rest may still be made elsewhere."""

    def before(self, layer: int) -> BlockState:
        """The state of a layer before the first token; asked for just before the layer runs."""

    def after(self, layer: int, state: BlockState) -> None:
        """Take the state of a layer after the last token, as soon as the layer has run."""

    def remembered(self) -> KeyMemory | None:
        """GoldFinch: the memory before the first token; asked for just before this call's tokens are added to it."""

    def remember(self, memory: KeyMemory) -> None:
        """GoldFinch: take the memory as soon as they are."""


def computing_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's dtype where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def pack(state: State) -> Tensor:
    """The blocks of a state as one (N, D) matrix, a row per sequence: what is stored at borders and chosen between."""
    return torch.cat([x.flatten(1) for block in state.blocks for x in block], 1)


def unpack(flat: Tensor, like: State, memory: KeyMemory | None = None) -> State:
    """The inverse of `pack`: a State of views into (N, D), shaped as `like` is (whose N may differ)."""
    shapes = [[x.shape[1:] for x in block] for block in like.blocks]
    parts = iter(flat.split([shape.numel() for block in shapes for shape in block], 1))
    return State(tuple(BlockState(*(next(parts).unflatten(1, shape) for shape in block)) for block in shapes), memory)


def select(state: State, rows: Tensor) -> State:
    """The states of some sequences. Args: rows (N',) int64, in any order, also repeated."""
    blocks = tuple(BlockState(*(x[rows] for x in block)) for block in state.blocks)
    if state.memory is None:
        return State(blocks)
    tokens, keys, borders, _ = state.memory
    place, chosen = ragged(borders, rows)
    return State(blocks, KeyMemory(tokens[place], keys[place], chosen))


def join(memories: list[KeyMemory]) -> KeyMemory:
    """The memories of all sequences, those of the first one first."""
    borders = _borders(torch.cat([memory.cu_seqlens.diff() for memory in memories]))
    return KeyMemory(torch.cat([x.tokens for x in memories]), torch.cat([x.keys for x in memories]), borders)


def ragged(cu_seqlens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the elements of some sequences lie: (M',) int64 places, and the borders (N' + 1,) of what they give."""
    rows = rows.to(cu_seqlens.device)
    lengths = cu_seqlens.diff()[rows]
    borders = _borders(lengths)
    offset = torch.repeat_interleave((cu_seqlens[rows] - borders[:-1]).long(), lengths.long())
    return torch.arange(len(offset), device=borders.device) + offset, borders


def _borders(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def ragged_append(memory: KeyMemory, tokens: Tensor, keys: Tensor, cu_seqlens: Tensor) -> KeyMemory:
    """Add new positions at the end of each sequence. Args: tokens (T,) int32, keys (T, R), borders (N + 1,) of both."""
    old, new = memory.cu_seqlens, cu_seqlens.to(memory.cu_seqlens)
    borders = old + new
    past_keys = memory.keys.to(keys.dtype)
    if len(old) == 2:  # no index as large as the document
        return KeyMemory(torch.cat([memory.tokens, tokens]), torch.cat([past_keys, keys]), borders, keys)
    total = int(borders[-1])
    sequence = torch.repeat_interleave(torch.arange(len(old) - 1, device=old.device), borders.diff().long())
    place = torch.arange(total, device=old.device) - borders[sequence]
    past = old.diff()[sequence]
    source = torch.where(place < past, old[sequence] + place, int(old[-1]) + new[sequence] + place - past).long()
    both = torch.cat([past_keys, keys])
    return KeyMemory(torch.cat([memory.tokens, tokens])[source], both[source], borders, keys)
