"""RWKV-4 in tiles of L = 32 tokens: all tiles advance side by side, then the state runs over the tiles.

Numerator and denominator are sums of e^(k_j) under a constant decay per channel, kept as (n, d, m) with the true values
n e^m and d e^m. The gradient is the same scan, backwards in time, over the gradients of the quotients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from infctx.ops.tiles import LENGTH, NOTHING, make_tiles, to_tiles, to_tokens


class Sum(NamedTuple):
    """Numbers n and d with a common exponent m."""

    n: Tensor
    d: Tensor
    m: Tensor


def wkv4_forward(inputs: tuple[Tensor, ...], state: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """As `reference.wkv4_forward`."""
    w, u, k, v = inputs
    before, last = _scan(w, Sum(v, torch.ones_like(v), k), Sum(*state.unbind(1)), lengths)
    now = _add(before, Sum(v, torch.ones_like(v), u + k))
    return now.n / now.d, torch.stack(last, 1)


def wkv4_backward(
    inputs: tuple[Tensor, ...], state: Tensor, dy: Tensor, dstate: Tensor, lengths: list[int]
) -> tuple[Tensor, ...]:
    """As `reference.wkv4_backward`."""
    w, u, k, v = inputs
    one, given = torch.ones_like(v), Sum(*state.unbind(1))
    before, last = _scan(w, Sum(v, one, k), given, lengths)
    now = _add(before, Sum(v, one, u + k))
    dn = dy / now.d
    dd = -dn * now.n / now.d
    # The true gradient of a true value n e^m is that of n over e^m: its exponent is -m.
    seen = Sum(dn.flip(0), dd.flip(0), -now.m.flip(0))
    end = Sum(dstate[:, 0].flip(0), dstate[:, 1].flip(0), -last.m.flip(0))
    after, first = (Sum(*(x.flip(0) for x in part)) for part in _scan(w, seen, end, lengths[::-1]))
    read, written = (u + k - now.m).exp(), (k + after.m).exp()
    du = read * (dn * v + dd)
    dk = du + written * (after.n * v + after.d)
    dv = read * dn + written * after.n
    dw = (before.m + w + after.m).exp() * (before.n * after.n + before.d * after.d)
    scale = (given.m + first.m).exp()
    return dw.sum(0), du.sum(0), dk, dv, torch.stack([scale * first.n, scale * first.d, torch.zeros_like(scale)], 1)


def _scan(w: Tensor, added: Sum, first: Sum, lengths: list[int]) -> tuple[Sum, Sum]:
    """S <- e^w S + added, from `first` (sequences, C): S before each token (tokens, C), and after each sequence."""
    tiles = make_tiles(lengths, w.device)
    parts = Sum(*to_tiles(added, tiles))
    inside = _inside(w, parts)  # as if each tile began with nothing
    total = Sum(*(x[torch.arange(len(x), device=w.device), tiles.sizes] for x in inside))
    state = Sum(*(x[tiles.order] for x in first))
    starts = Sum(*(torch.empty_like(x) for x in total))
    for step in tiles.steps:
        alive = Sum(*(x[: len(step)] for x in state))
        for x, y in zip(starts, alive, strict=True):
            x[step] = y
        ended = _add(_decay(alive, w * tiles.sizes[step].unsqueeze(1)), Sum(*(x[step] for x in total)))
        for x, y in zip(state, ended, strict=True):
            x[: len(step)] = y
    age = torch.arange(LENGTH, device=w.device, dtype=w.dtype).unsqueeze(1)
    w = w.clamp(min=NOTHING / LENGTH)  # 0 times -inf is no decay of age 0
    carried = _decay(Sum(*(x.unsqueeze(1).expand(-1, LENGTH, -1) for x in starts)), age * w)
    before = _add(carried, Sum(*(x[:, :-1] for x in inside)))
    last = (torch.empty_like(x).index_copy(0, tiles.order, x) for x in state)
    return Sum(*(to_tokens(x, tiles, sum(lengths)) for x in before)), Sum(*last)


def _inside(w: Tensor, parts: Sum) -> Sum:
    """(tiles, L + 1, C): the sums before each token of a tile and after its last."""
    zero = torch.zeros_like(parts.n[:, 0])
    sums = [Sum(zero, zero, zero + NOTHING)]
    for t in range(LENGTH):
        sums.append(_add(_decay(sums[-1], w), Sum(*(x[:, t] for x in parts))))
    return Sum(*(torch.stack(x, 1) for x in zip(*sums, strict=True)))


def _decay(x: Sum, w: Tensor) -> Sum:
    return x._replace(m=x.m + w)


def _add(x: Sum, y: Sum) -> Sum:
    top = torch.maximum(x.m, y.m)
    left, right = (x.m - top).exp(), (y.m - top).exp()
    return Sum(left * x.n + right * y.n, left * x.d + right * y.d, top)
