"""What the architectures share: where sequences begin and end in a row of tokens, and the token shift.

B rows, T tokens, C channels, N sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """N sequences end to end in one row of T tokens; indices into [carried (N), tokens (T)]."""

    cu_seqlens: Tensor  # (N + 1,) int32
    before: Tensor  # (T,) what precedes each token
    after: Tensor  # (N,) what each sequence leaves behind; its own carried row if it has no token


class Shared(NamedTuple):
    """What goes down the layers inside a segment."""

    kernel: str
    packing: Packing | None = None
    v_first: Tensor | None = None  # RWKV-7: the values of layer 0

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Borders of the sequences, if they are packed."""
        return self.packing.cu_seqlens if self.packing else None


def pack_sequences(cu_seqlens: Tensor, length: int) -> Packing:
    """Index the borders of sequences once for all layers. Args: cu_seqlens (N + 1,) from 0 to `length`."""
    n = len(cu_seqlens) - 1
    token = torch.arange(length, device=cu_seqlens.device)
    border = cu_seqlens.long()
    sequence = torch.searchsorted(border[1:], token, right=True)
    before = torch.where(border[sequence] == token, sequence, token + (n - 1))
    own = torch.arange(n, device=cu_seqlens.device)
    return Packing(cu_seqlens, before, torch.where(border.diff() > 0, border[1:] + (n - 1), own))


def token_shift(x: Tensor, carried: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """The token before each one (B, T, C), and what to carry on (N, C). Args: x (B, T, C), carried (N, C) float32."""
    if packing is None:
        rows = torch.cat([carried.unsqueeze(1).to(x.dtype), x], 1)
        return rows[:, :-1], rows[:, -1].to(carried.dtype)
    flat = torch.cat([carried.to(x.dtype), x.squeeze(0)])
    return flat[packing.before].unsqueeze(0), flat[packing.after].to(carried.dtype)
