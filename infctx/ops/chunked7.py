"""RWKV-7 in tiles of L = 32 tokens, as batched matrix products.

Inside a tile, with g the running sum of the log decays (e: exclusive), u_t = S_{t-1} a_t solves a unit lower
triangular system, and the tile maps its first state S to the next one by an affine map:
    (I - Aab) U = a^ S^T + Aak V ;  Y = Q S^T + O ;  S' = S P + C
The maps of all tiles are made at once; only S <- S P + C runs along time. The gradient goes the same way back.
Yang et al. 2024, arXiv:2406.06484 (the triangular form); RWKV-7, arXiv:2503.14456, appendix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from infctx.ops import reference
from infctx.ops.tiles import Tiles, from_head_tiles, make_tiles, to_head_tiles

# e^(L/2 * |w|) must stay well inside float32: RWKV-7 itself never goes below a log decay of -0.6065 per token.
LOWEST_DECAY = -5.0


class Maps(NamedTuple):
    """What a tile does to its first state, and what the gradient needs again."""

    x: dict[str, Tensor]  # scaled inputs, (tiles, H, L, N)
    a_qk: Tensor
    a_qb: Tensor
    a_ak: Tensor
    system: Tensor  # I - Aab
    u0: Tensor
    q: Tensor
    p: Tensor


def wkv7_forward(inputs: tuple[Tensor, ...], state: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """As `reference.wkv7_forward`; decays outside RWKV-7's range go there, since tiles would overflow."""
    if _outside_range(inputs[1]):
        return reference.wkv7_forward(inputs, state, lengths)
    tiles = make_tiles(lengths, state.device)
    m = _maps(to_head_tiles(inputs, tiles))
    starts, last = _scan(m, state, tiles)
    y = m.q @ starts.mT + m.a_qk @ m.x["v"] + m.a_qb @ m.u0
    return from_head_tiles(y, tiles, sum(lengths)), last


def wkv7_backward(
    inputs: tuple[Tensor, ...], state: Tensor, dy: Tensor, dstate: Tensor, lengths: list[int]
) -> tuple[Tensor, ...]:
    """As `reference.wkv7_backward`; recomputes the tiles' maps, so that forward keeps nothing but its inputs."""
    if _outside_range(inputs[1]):
        return reference.wkv7_backward(inputs, state, dy, dstate, lengths)
    tiles = make_tiles(lengths, state.device)
    m = _maps(to_head_tiles(inputs, tiles))
    starts, _ = _scan(m, state, tiles)
    (dy,) = to_head_tiles((dy,), tiles)
    ends, first = _scan_back(m, dy, dstate, tiles)
    return *(from_head_tiles(x, tiles, sum(lengths)) for x in _inside(m, starts, dy, ends)), first


def _maps(inputs: list[Tensor]) -> Maps:
    r, w, k, v, a, b = inputs
    g = w.cumsum(-2)
    ge, last, mid = g - w, g[..., -1:, :], g[..., g.shape[-2] // 2, None, :]
    up, down, tail = (g - mid).exp(), (mid - g).exp(), (last - g).exp()
    x = {"r": r, "a": a, "k": k, "b": b, "v": v, "up": up, "down": down, "tail": tail, "decay": last.exp(),
         "g": g.exp(), "ge": ge.exp(), "up_e": (ge - mid).exp()}  # fmt: skip
    rc, ac, kc, bc = r * up, a * x["up_e"], k * down, b * down
    a_qk, a_qb = (rc @ kc.mT).tril(), (rc @ bc.mT).tril()
    a_ak = (ac @ kc.mT).tril(-1)
    system = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device) - (ac @ bc.mT).tril(-1)
    right = torch.cat([a * x["ge"], a_ak @ v], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    wy, u0 = solved[..., : a.shape[-1]], solved[..., a.shape[-1] :]
    p = torch.diag_embed(x["decay"].squeeze(-2)) + wy.mT @ (b * tail)
    return Maps(x, a_qk, a_qb, a_ak, system, u0, torch.addcmul(a_qb @ wy, r, x["g"]), p)


def _scan(m: Maps, state: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The state at the start of every tile (tiles, H, V, K), and at the end of every sequence (N, H, V, K)."""
    c = m.x["v"].mT @ (m.x["k"] * m.x["tail"]) + m.u0.mT @ (m.x["b"] * m.x["tail"])
    s = state[tiles.order]
    starts = torch.empty_like(c)
    for step in tiles.steps:
        alive = s[: len(step)]
        starts[step] = alive
        s[: len(step)] = alive @ m.p[step] + c[step]
    return starts, torch.empty_like(s).index_copy(0, tiles.order, s)


def _scan_back(m: Maps, dy: Tensor, dstate: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The gradient of the state at the end of every tile, and of the incoming states."""
    e = dy.mT @ m.q
    s = dstate[tiles.order]
    ends = torch.empty_like(e)
    for step in reversed(tiles.steps):
        alive = s[: len(step)]
        ends[step] = alive
        s[: len(step)] = alive @ m.p[step].mT + e[step]
    return ends, torch.empty_like(s).index_copy(0, tiles.order, s)


def _inside(m: Maps, s: Tensor, dy: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Gradients of r, w, k, v, a, b, given the state s before each tile and the gradient g of the one after it."""
    x = m.x
    v, b_tail = x["v"], x["b"] * x["tail"]
    a_in = x["a"] * x["ge"]
    u = torch.linalg.solve_triangular(m.system, a_in @ s.mT, upper=False, unitriangular=True) + m.u0
    du = m.a_qb.mT @ dy + b_tail @ g.mT
    du = torch.linalg.solve_triangular(m.system.mT, du, upper=True, unitriangular=True)
    d_qk, d_qb = (dy @ v.mT).tril(), (dy @ u.mT).tril()
    d_ak, d_ab = (du @ v.mT).tril(-1), (du @ u.mT).tril(-1)
    rc, ac, kc, bc = x["r"] * x["up"], x["a"] * x["up_e"], x["k"] * x["down"], x["b"] * x["down"]
    dk_tail, db_tail = (v @ g) * x["tail"], (u @ g) * x["tail"]
    dr = (d_qk @ kc + d_qb @ bc) * x["up"] + (dy @ s) * x["g"]
    da = (d_ak @ kc + d_ab @ bc) * x["up_e"] + (du @ s) * x["ge"]
    dk = (d_qk.mT @ rc + d_ak.mT @ ac) * x["down"] + dk_tail
    db = (d_qb.mT @ rc + d_ab.mT @ ac) * x["down"] + db_tail
    dv = m.a_qk.mT @ dy + (x["k"] * x["tail"]) @ g.mT + m.a_ak.mT @ du
    d_last = (x["k"] * dk_tail + x["b"] * db_tail).sum(-2, keepdim=True) + (s * g).sum(-2, keepdim=True) * x["decay"]
    d_ge = x["a"] * da
    d_g = x["r"] * dr - x["k"] * dk - x["b"] * db + d_ge
    dw = d_g.flip(-2).cumsum(-2).flip(-2) - d_ge + d_last
    return dr, dw, dk, dv, da, db


def _outside_range(w: Tensor) -> bool:
    return w.numel() > 0 and bool(w.min() < LOWEST_DECAY)
