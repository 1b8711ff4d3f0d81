"""Attention over keys and values that are not kept: they are rebuilt, tile by tile, from tokens and compressed keys.

M positions read so far in N sequences, C channels, R compressed, H heads. Goldstein et al. 2024, arXiv:2407.12077
(GoldFinch), sections 3.3 and 3.4. Forward keeps a running softmax; backward rebuilds each tile once more, so that
neither ever holds the keys of more than TILE positions.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx.state import KeyMemory, computing_dtype

TILE = 256  # positions: scores of 2,048 queries in 32 heads take 64 MB


class Tables(NamedTuple):
    """The weights that rebuild keys and values: the model's, then the layer's, whose names are those of its tensors."""

    emb: Tensor  # (vocab, C)
    ln0_weight: Tensor  # (C,)
    ln0_bias: Tensor
    w_kv_cache_b: Tensor  # (C, C + R)
    time_maa_v_cache: Tensor  # (1, 1, C)
    time_maa_k: Tensor
    time_maa_v: Tensor
    time_maa_kv_w1: Tensor  # (C, 2 rank)
    time_maa_kv_w2: Tensor  # (2, rank, C)
    time_key_w1: Tensor  # (C, rank), and back
    time_key_w2: Tensor
    time_value_w1: Tensor
    time_value_w2: Tensor
    ln_k_weight: Tensor  # (C,)
    ln_k_bias: Tensor
    ln_v_weight: Tensor
    ln_v_bias: Tensor


class _Plan(NamedTuple):
    """What is not differentiable."""

    tokens: Tensor
    spans: list[tuple[int, int, int, int]]  # of each sequence: first and last query, first and last position
    heads: int
    dtype: torch.dtype


def gold_attention(q: Tensor, memory: KeyMemory, cu_seqlens: Tensor, tables: Tables) -> Tensor:
    """Causal attention: the last query of a sequence sees all its positions, the one before it one less, and so on.

    Args: q (tokens, H, N), of N sequences with borders cu_seqlens; memory: with this segment's positions at the end of
        each sequence. Returns: (tokens, C).
    """
    queries, positions = cu_seqlens.tolist(), memory.cu_seqlens.tolist()
    spans = list(zip(queries[:-1], queries[1:], positions[:-1], positions[1:], strict=True))
    plan = _Plan(memory.tokens, [x for x in spans if x[0] < x[1]], q.shape[1], computing_dtype(q))
    return _Attention.apply(plan, q, memory.keys, *tables)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: Tensor, keys: Tensor, *weights: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            tables = Tables(weights[0], *(w.to(plan.dtype) for w in weights[1:]))
            out = q.new_empty(len(q), q.shape[1] * q.shape[2], dtype=plan.dtype)
            lse = torch.empty(q.shape[1], len(q), 1, dtype=_wide(plan.dtype), device=q.device)
            for span in plan.spans:
                out[span[0] : span[1]], lse[:, span[0] : span[1]] = _attend(plan, span, q, keys, tables)
        ctx.plan = plan
        ctx.save_for_backward(q, keys, out, lse, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, keys, out, lse, *weights = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            gradient = _Gradient(ctx.plan, q, keys, weights)
            for span in ctx.plan.spans:
                gradient.add(span, out, lse, dout)
            return None, *gradient.result()


def _attend(plan: _Plan, span: tuple[int, ...], q: Tensor, keys: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """One sequence: its outputs (queries, C), and the logarithm of the softmax's denominator (H, queries, 1)."""
    rows = _heads(q[span[0] : span[1]].flatten(1), plan.heads, plan.dtype) * q.shape[-1] ** -0.5
    top = torch.full((*rows.shape[:2], 1), -torch.inf, dtype=_wide(plan.dtype), device=q.device)
    total, sums = torch.zeros_like(top), rows.new_zeros(rows.shape, dtype=top.dtype)
    for begin in range(span[2], span[3], TILE):
        tile = range(begin, min(begin + TILE, span[3]))
        rebuilt = _rebuild(*_sources(plan, span, tile, keys, tables), begin == span[2], tables)
        k, v = (_heads(x, plan.heads, plan.dtype) for x in rebuilt)
        scores = _masked((rows @ k.mT).to(top.dtype), span, tile)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        p, scale = (scores - higher).exp(), (top - higher).exp()
        sums = sums * scale + (p.to(v.dtype) @ v).to(top.dtype)
        total, top = total * scale + p.sum(-1, keepdim=True), higher
    return (sums / total).transpose(0, 1).flatten(1).to(plan.dtype), top + total.log()


class _Gradient:
    """Sums over the tiles of all sequences, in float32 at least."""

    def __init__(self, plan: _Plan, q: Tensor, keys: Tensor, weights: list[Tensor]) -> None:
        self.plan, self.q, self.keys, self.weights = plan, q, keys, weights
        self.tables = Tables(weights[0], *(w.detach().to(plan.dtype).requires_grad_() for w in weights[1:]))
        wide = _wide(plan.dtype)
        self.dq, self.dkeys, *self.dw = (torch.zeros_like(x, dtype=wide) for x in (q, keys, *weights))

    def add(self, span: tuple[int, int, int, int], out: Tensor, lse: Tensor, dout: Tensor) -> None:
        """One sequence."""
        part = slice(span[0], span[1])
        heads, dtype = self.plan.heads, self.plan.dtype
        scale = self.q.shape[-1] ** -0.5
        q, o, do = (_heads(x[part].flatten(1), heads, dtype) for x in (self.q, out, dout))
        delta = (o.to(lse.dtype) * do.to(lse.dtype)).sum(-1, keepdim=True)
        for begin in range(span[2], span[3], TILE):
            tile = range(begin, min(begin + TILE, span[3]))
            with torch.enable_grad():
                rows, low = _sources(self.plan, span, tile, self.keys, self.tables)
                sources = rows.detach().requires_grad_(), low.detach().requires_grad_()
                rebuilt = _rebuild(*sources, begin == span[2], self.tables)
            k, v = (_heads(x.detach(), heads, dtype) for x in rebuilt)
            p = (_masked((q @ k.mT).to(lse.dtype) * scale, span, tile) - lse[:, part]).exp()
            ds = (p * ((do @ v.mT).to(lse.dtype) - delta) * scale).to(dtype)
            self.dq[part] += (ds @ k).transpose(0, 1)
            seeds = [x.transpose(0, 1).flatten(1) for x in (ds.mT @ q, p.to(dtype).mT @ do)]
            self._rebuilt(rebuilt, sources, seeds, span, tile)

    def _rebuilt(
        self,
        rebuilt: tuple[Tensor, ...],
        sources: tuple[Tensor, ...],
        seeds: list[Tensor],
        span: tuple[int, ...],
        tile: range,
    ) -> None:
        leaves = (*sources, *self.tables[1:])
        drows, dkeys, *dw = torch.autograd.grad(rebuilt, leaves, seeds)
        first = 1 if tile.start == span[2] else 0  # the row of zeros before a sequence
        where = slice(tile.start - 1 + first, tile.stop)
        self.dw[0].index_add_(0, self.plan.tokens[where], drows[first:].to(self.dq.dtype))
        self.dkeys[where] += dkeys[first:]
        for total, part in zip(self.dw[1:], dw, strict=True):
            total += part

    def result(self) -> tuple[Tensor, ...]:
        """Gradients of q, the compressed keys and the tables, in their dtypes."""
        grads = (self.dq, self.dkeys, *self.dw)
        return tuple(g.to(x.dtype) for g, x in zip(grads, (self.q, self.keys, *self.weights), strict=True))


def _sources(plan: _Plan, span: tuple[int, ...], tile: range, keys: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Embeddings (n + 1, C) and compressed keys (n + 1, R) of a tile and of the position before it, if there is one."""
    where = slice(tile.start - 1 if tile.start > span[2] else tile.start, tile.stop)
    rows, low = tables.emb[plan.tokens[where].long()].to(plan.dtype), keys[where].to(plan.dtype)
    missing = len(tile) + 1 - len(rows)
    return F.pad(rows, (0, 0, missing, 0)), F.pad(low, (0, 0, missing, 0))


def _rebuild(rows: Tensor, low: Tensor, first: bool, t: Tables) -> tuple[Tensor, Tensor]:
    """Keys and values (n, C) of n positions, from what `_sources` gives. Args: first: nothing comes before them."""
    embedded = F.layer_norm(rows, rows.shape[1:], t.ln0_weight, t.ln0_bias)
    x, kept = rms_norm(embedded), rms_norm(F.linear(torch.cat([embedded, low], 1), t.w_kv_cache_b))
    if first:
        x, kept = (F.pad(y[1:], (0, 0, 1, 0)) for y in (x, kept))
    now, dx, dk = x[1:], x[:-1] - x[1:], kept[:-1] - kept[1:]
    low_rank = torch.tanh((now + dx * t.time_maa_v_cache[0]) @ t.time_maa_kv_w1).unflatten(1, (2, -1))
    k = kept[1:] + dk * (t.time_maa_k[0] + low_rank[:, 0] @ t.time_maa_kv_w2[0])
    v = now + dx * (t.time_maa_v[0] + low_rank[:, 1] @ t.time_maa_kv_w2[1])
    k = k + torch.tanh(k @ t.time_key_w1) @ t.time_key_w2
    v = v + torch.tanh(v @ t.time_value_w1) @ t.time_value_w2
    k = F.layer_norm(k, k.shape[1:], t.ln_k_weight, t.ln_k_bias)
    return k, F.layer_norm(v, v.shape[1:], t.ln_v_weight, t.ln_v_bias)


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis, without a weight; 1e8 steep at zero, but not infinitely."""
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8)


def _masked(scores: Tensor, span: tuple[int, ...], tile: range) -> Tensor:
    """-inf where a position comes after the query. scores: (H, queries, n)."""
    last = span[3] - (span[1] - span[0])  # the position of the first query
    if tile.stop <= last + 1:
        return scores
    place = torch.arange(tile.start, tile.stop, device=scores.device)
    return scores.masked_fill(place > torch.arange(last, span[3], device=scores.device).unsqueeze(1), -torch.inf)


def _heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(n, C) -> (H, n, N)."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
