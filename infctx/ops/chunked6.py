"""RWKV-5 and RWKV-6 in tiles of L = 32 tokens, right for any decay.

Inside a tile A_tj = sum_k r_t k_j e^(w_{j+1} + ... + w_{t-1}) for j < t. Splitting the tile in halves, and those again,
puts a border between every such pair: what lies right of the border goes with r, what lies left of it with k, so every
exponent is a sum of log decays, never a difference, and neither overflows nor cancels. Between tiles only
S <- S diag(e^W) + C runs along time. RWKV-6: arXiv:2404.05892; tiles of a gated recurrence: arXiv:2312.06635.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from infctx.ops.tiles import LENGTH, Tiles, from_head_tiles, make_tiles, to_head_tiles


def wkv6_forward(inputs: tuple[Tensor, ...], state: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """As `reference.wkv6_forward`."""
    *tokens, u = inputs
    tiles = make_tiles(lengths, state.device)
    r, k, v, w = to_head_tiles(tuple(tokens), tiles)
    starts, last = _scan(w.sum(-2, keepdim=True).exp(), v.mT @ (k * after(w).exp()), state, tiles)
    y = _scores(r, k, w, u) @ v + (r * before(w).exp()) @ starts.mT
    return from_head_tiles(y, tiles, len(tokens[0])), last


def wkv6_backward(
    inputs: tuple[Tensor, ...], state: Tensor, dy: Tensor, dstate: Tensor, lengths: list[int]
) -> tuple[Tensor, ...]:
    """As `reference.wkv6_backward`; recomputes the tiles, so that forward keeps nothing but its inputs."""
    *tokens, u = inputs
    tiles = make_tiles(lengths, state.device)
    r, k, v, w, dy = to_head_tiles((*tokens, dy), tiles)
    head, tail, total = before(w).exp(), after(w).exp(), w.sum(-2, keepdim=True).exp()
    s, _ = _scan(total, v.mT @ (k * tail), state, tiles)
    g, first = _scan(total, dy.mT @ (r * head), dstate, tiles, back=True)
    d_scores, scores = dy @ v.mT, _scores(r, k, w, u)
    dr, dk = (dy @ s) * head, (v @ g) * tail
    dw = after(r * dr) + before(k * dk) + (s * g).sum(-2, keepdim=True) * total
    dv = scores.mT @ dy + (k * tail) @ g.mT
    for half, up, down in _levels(w):
        r2, k1 = _halves(r, half)[1] * up, _halves(k, half)[0] * down
        block = _block(d_scores, half)
        dr2, dk1 = (block @ k1) * up, (block.mT @ r2) * down
        _halves(dr, half)[1].add_(dr2)
        _halves(dk, half)[0].add_(dk1)
        _halves(dw, half)[1].add_(after(_halves(r, half)[1] * dr2))
        _halves(dw, half)[0].add_(before(_halves(k, half)[0] * dk1))
    diagonal = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    bonus = u.unsqueeze(-2)
    du = (diagonal * r * k).sum((0, 2))
    grads = (dr + diagonal * bonus * k, dk + diagonal * bonus * r, dv, dw)
    return *(from_head_tiles(x, tiles, len(tokens[0])) for x in grads), du, first


def before(x: Tensor) -> Tensor:
    """The sum over the tokens before each one, along the last axis but one."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :].cumsum(-2)], -2)


def after(x: Tensor) -> Tensor:
    """The sum over the tokens after each one."""
    return before(x.flip(-2)).flip(-2)


def _scores(r: Tensor, k: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """A (tiles, H, L, L): how much token t reads of the value of token j."""
    scores = torch.diag_embed((r * k * u.unsqueeze(-2)).sum(-1))
    for half, up, down in _levels(w):
        _block(scores, half).copy_((_halves(r, half)[1] * up) @ (_halves(k, half)[0] * down).mT)
    return scores


def _levels(w: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each way of halving: tokens in a half, the decay from the border to a token right of it, and from left."""
    half = LENGTH // 2
    while half:
        left, right = _halves(w, half)
        yield half, before(right).exp(), after(left).exp()
        half //= 2


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(tiles, H, L, N) -> the left and right halves of every pair, views (tiles, H, pairs, half, N)."""
    left, right = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return left, right


def _block(scores: Tensor, half: int) -> Tensor:
    """The part of (tiles, H, L, L) where tokens of a right half read their left half: (tiles, H, pairs, half, half)."""
    pairs = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return pairs[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _scan(decay: Tensor, added: Tensor, state: Tensor, tiles: Tiles, back: bool = False) -> tuple[Tensor, Tensor]:
    """S <- S diag(decay) + added along the tiles: S before each tile, and what is left. Args: back: from the end."""
    s = state[tiles.order]
    starts = torch.empty_like(added)
    for step in reversed(tiles.steps) if back else tiles.steps:
        alive = s[: len(step)]
        starts[step] = alive
        s[: len(step)] = alive * decay[step] + added[step]
    return starts, torch.empty_like(s).index_copy(0, tiles.order, s)
