"""The definition of each recurrence and of its gradient: one token per turn of the loop.

H heads, K key channels, V value channels (K = V = N). Tokens of all sequences lie end to end, (tokens, H, N); `lengths`
says where one ends; states are (sequences, H, V, K). Slow on purpose: every other backend is held against these lines.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def wkv7_forward(inputs: tuple[Tensor, ...], state: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """S <- S diag(e^w) + (S a) b^T + v k^T ; y = S r   (RWKV-7, Peng et al. 2025, arXiv:2503.14456, section 4).

    Args: inputs r, w, k, v, a, b, each (tokens, H, N); w is the log decay. Returns: y (tokens, H, N) and last states.
    """

    def rows(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        y = torch.empty_like(v)
        for t in range(r.shape[1]):
            s = _wkv7_step(w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], s)
            y[:, t] = _apply(s, r[:, t])
        return y, s.clone()

    return _by_sequence(rows, inputs, (state,), lengths)


def wkv7_backward(
    inputs: tuple[Tensor, ...], state: Tensor, dy: Tensor, dstate: Tensor, lengths: list[int]
) -> tuple[Tensor, ...]:
    """Gradients of r, w, k, v, a, b and of the incoming states, given those of y and of the outgoing states."""
    return _by_sequence(_wkv7_backward_rows, (*inputs, dy), (state, dstate), lengths)


def _wkv7_backward_rows(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, dy: Tensor, s: Tensor, g: Tensor
) -> tuple[Tensor, ...]:
    states = [s]
    for t in range(r.shape[1]):
        states.append(_wkv7_step(w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], states[-1]))
    grads = tuple(torch.empty_like(x) for x in (r, w, k, v, a, b))
    for t in reversed(range(r.shape[1])):
        after, before, decay = states.pop(), states[-1], w[:, t].exp()
        g = g + _outer(dy[:, t], r[:, t])
        d_sa = _apply(g, b[:, t])
        values = (
            _apply(after.mT, dy[:, t]),
            decay * (before * g).sum(-2),
            _apply(g.mT, v[:, t]),
            _apply(g, k[:, t]),
            _apply(before.mT, d_sa),
            _apply(g.mT, _apply(before, a[:, t])),
        )
        for grad, value in zip(grads, values, strict=True):
            grad[:, t] = value
        g = g * decay.unsqueeze(-2) + _outer(d_sa, a[:, t])
    return *grads, g.clone()


def _wkv7_step(w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return s * w.exp().unsqueeze(-2) + _outer(_apply(s, a), b) + _outer(v, k)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _by_sequence(
    rows: Callable[..., tuple[Tensor, ...]], tokens: tuple[Tensor, ...], states: tuple[Tensor, ...], lengths: list[int]
) -> tuple[Tensor, ...]:
    """Run `rows` on (rows, T, ...) tensors: all sequences at once if they are equally long, else one by one."""
    if len(set(lengths)) == 1:
        out = rows(*(x.unflatten(0, (len(lengths), lengths[0])) for x in tokens), *states)
        return *(x.flatten(0, 1) for x in out[:-1]), out[-1]
    parts, begin = [], 0
    for i, n in enumerate(lengths):
        parts.append(rows(*(x[begin : begin + n].unsqueeze(0) for x in tokens), *(s[i : i + 1] for s in states)))
        begin += n
    columns = list(zip(*parts, strict=True))
    return *(torch.cat(x, 1).squeeze(0) for x in columns[:-1]), torch.cat(columns[-1])
