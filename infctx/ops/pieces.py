"""Long sequences cut into pieces that run side by side, exactly: `cuda/pieces.cuh` says how.

For few and long sequences on a GPU, whose multiprocessors would idle otherwise. Each piece costs a second pass over its
tokens, its summary; the gradient needs another. Nothing here waits for the device. The bits of a result depend on the
length of the pieces, but not on what other sequences there are: every sequence is cut from its own first token on.
"""

from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infctx.ops.native import VALUE, Call, Native

UNIT = 64  # a piece is a multiple of so many tokens, as the chunks of the tensor-core kernels are
RESIDENT = 2  # blocks of a kernel that a multiprocessor runs at the full speed of each
SCAN = 4  # tokens of the recurrent kernel in the time of one step of the scan over pieces, by estimate
LAUNCHES = 256  # and in that of the small kernels that pieces need beside
WORTHWHILE = 1.5  # how much faster pieces have to be


class Pieces(NamedTuple):
    """The pieces of all sequences in order. Their number depends on shapes only, so the last ones may be empty."""

    borders: Tensor  # (pieces + 1,) the first token of each, then the number of tokens
    firsts: Tensor  # (sequences + 1,) the first piece of each sequence, then the number of pieces


def piece_length(tokens: int, blocks: int, multiprocessors: int, summary: float = 1) -> int | None:
    """Tokens of a piece, or None where whole sequences are about as fast.

    In tokens of the ordinary kernel one after another, whole sequences take `tokens`, and n pieces of each
    (1 + summary) * tokens / n + SCAN * n + LAUNCHES: least for n = sqrt((1 + summary) * tokens / SCAN), or for as many
    as keep the device busy, if those are fewer.

    Args: tokens: of a sequence. blocks: of the ordinary kernel for all sequences. summary: the time for a token in the
        summary kernel over that in the ordinary one.
    """
    n = min(RESIDENT * multiprocessors // max(blocks, 1), isqrt(int((1 + summary) * tokens / SCAN)))
    if n < 2:
        return None
    length = -(-tokens // (n * UNIT)) * UNIT
    cost = (1 + summary) * length + SCAN * -(-tokens // length) + LAUNCHES
    return length if WORTHWHILE * cost <= tokens else None


def cut(borders: Tensor, tokens: int, length: int) -> Pieces:
    """Cut each sequence at multiples of `length`; an empty one is one empty piece."""
    count = _count(tokens, len(borders) - 1, length)
    lengths = borders.diff()
    ends = (-(-lengths // length)).clamp(min=1).cumsum(0)
    firsts = torch.cat([borders.new_zeros(1), ends])
    firsts[-1:] = count
    piece = torch.arange(count, device=borders.device)
    sequence = torch.searchsorted(ends[:-1], piece, right=True)
    # Borders that fall must not be mended here: the kernels stop at them.
    offset = torch.minimum((piece - firsts[sequence]) * length, lengths.clamp(min=0)[sequence])
    return Pieces(torch.cat([borders[sequence] + offset, borders[-1:]]), firsts)


def saved(native: Native, op: str, inputs: tuple[Tensor, ...], state: Tensor, length: int) -> Any:
    """As `Backend.saved`, for pieces of this length."""
    shape = inputs[VALUE[op]].shape
    count = _count(shape[0] * shape[1], state.shape[0], length)
    states = state.new_empty(()).expand(count, *state.shape[1:])
    return native.saved(op, inputs, states) + sum(_room(op, states.shape))


def forward(
    native: Native, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor, keep: bool, length: int
) -> tuple[Tensor, ...]:
    """As `Backend.forward`, in pieces of this length. Raises: as `Native.forward`."""
    v = inputs[VALUE[op]]
    pieces = cut(borders, v.shape[0] * v.shape[1], length)
    lasts = state.new_empty(len(pieces.borders) - 1, *state.shape[1:])
    room = _room(op, lasts.shape)
    buffer = state.new_empty(native.saved(op, inputs, lasts) * keep + sum(room))
    kept, starts, transition, saved_lasts = _parts(buffer, room, lasts.shape)
    dense, call, over = _prepare(native, op, inputs, state, lasts, pieces)
    added, y = torch.empty_like(lasts), torch.empty_like(dense[VALUE[op]])
    native.library.call(f"{op}_summary", call, [*dense, transition, added])
    native.library.call(f"{op}_scan", over, [transition, added, state.contiguous(), starts])
    native.library.call(f"{op}{native.suffix}_forward", call, [*dense, starts, y, lasts, kept if keep else None])
    if op == "wkv4":
        saved_lasts.copy_(lasts)
    return y, lasts[pieces.firsts[1:] - 1], buffer if keep else state.new_empty(0)


def backward(
    native: Native, op: str, inputs: tuple[Tensor, ...], state: Tensor, saved: Tensor, dy: Tensor, dstate: Tensor,
    borders: Tensor, length: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `Backend.backward`, in pieces of the length of the forward."""
    if not saved.numel():
        saved = forward(native, op, inputs, state, borders, True, length)[-1]
    v = inputs[VALUE[op]]
    pieces = cut(borders, v.shape[0] * v.shape[1], length)
    ends = state.new_empty(len(pieces.borders) - 1, *state.shape[1:])
    kept, starts, transition, lasts = _parts(saved, _room(op, ends.shape), ends.shape)
    dense, call, over = _prepare(native, op, inputs, state, ends, pieces)
    added, dy = torch.empty_like(ends), dy.to(dense[VALUE[op]].dtype).contiguous()
    exponents = [starts, lasts] if op == "wkv4" else []
    native.library.call(f"{op}_summary_back", call, [*dense, starts, dy, added])
    native.library.call(f"{op}_scan_back", over, [transition, added, *exponents, dstate.contiguous(), ends])
    *grads, first = native.backward(op, tuple(dense), starts, kept, dy, ends, pieces.borders)
    return *grads, first[pieces.firsts[:-1]]


def _count(tokens: Any, sequences: Any, length: int) -> Any:
    """No fewer than there are pieces, for any borders: n tokens make at most 1 + n // length."""
    return sequences + tokens // length


def _prepare(
    native: Native, op: str, inputs: tuple[Tensor, ...], state: Tensor, states: Tensor, pieces: Pieces
) -> tuple[list[Tensor], Call, Call]:
    """The inputs as the kernels take them, the call over the tokens of the pieces, and that over their maps."""
    dense, call = native.prepare(op, inputs, states, pieces.borders)
    over = Call(
        len(state), len(states), call.heads, call.size, pieces.firsts.data_ptr(), call.dtype, call.threads, call.stream
    )
    return dense, call, over


def _room(op: str, states: torch.Size) -> list[Any]:
    """Elements of what is saved beside the ordinary kernel's: first states, transitions, and last states of wkv4."""
    size = prod(states)
    return [size, size // {"wkv4": 3, "wkv6": states[-1], "wkv7": 1}[op], size if op == "wkv4" else 0]


def _parts(buffer: Tensor, room: list[int], states: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ordinary kernel's part of what is saved, first states, transitions, and last states of wkv4."""
    kept, starts, transition, lasts = buffer.split([len(buffer) - sum(room), *room])
    return kept, starts.view(states), transition, lasts.view(states) if len(lasts) else lasts
