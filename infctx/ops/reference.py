"""The definition of each recurrence and of its gradient: one token per turn of the loop.

H heads, K key channels, V value channels (K = V = N). Tokens of all sequences lie end to end, (tokens, H, N); `lengths`
says where one ends; states are (sequences, H, V, K). Slow on purpose: every other backend is held against these lines.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def wkv4_forward(inputs: tuple[Tensor, ...], state: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """y_t = (N + e^(u+k) v) / (D + e^(u+k)) ; N <- e^w N + e^k v ; D <- e^w D + e^k   (arXiv:2305.13048, appendix D).

    Args: inputs w, u (C,) and k, v (tokens, C); state (sequences, 3, C) n, d, m with N = n e^m and D = d e^m.
    """
    w, u, *tokens = inputs

    def rows(k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        y, n, d, m = torch.empty_like(v), s[:, 0], s[:, 1], s[:, 2]
        for t in range(k.shape[1]):
            before, now, _ = _scales(m, u + k[:, t])
            y[:, t] = (before * n + now * v[:, t]) / (before * d + now)
            before, now, m = _scales(m + w, k[:, t])
            n, d = before * n + now * v[:, t], before * d + now
        return y, torch.stack([n, d, m], 1)

    return _by_sequence(rows, tuple(tokens), (state,), lengths)


def wkv4_backward(
    inputs: tuple[Tensor, ...], state: Tensor, dy: Tensor, dstate: Tensor, lengths: list[int]
) -> tuple[Tensor, ...]:
    """Gradients of w, u, k, v and of the incoming n and d, each pair at the exponent stored with it."""
    w, u, *tokens = inputs

    def rows(k: Tensor, v: Tensor, dy: Tensor, s: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        states = [s.unbind(1)]
        for t in range(k.shape[1]):
            n, d, m = states[-1]
            before, now, m = _scales(m + w, k[:, t])
            states.append((before * n + now * v[:, t], before * d + now, m))
        (gn, gd, _), grads = g.unbind(1), [torch.empty_like(k) for _ in range(4)]
        for t in reversed(range(k.shape[1])):
            n, d, m = states[t]
            before, now, _ = _scales(m + w, k[:, t])
            dw = before * (gn * n + gd * d)
            dk, dv = now * (gn * v[:, t] + gd), now * gn
            gn, gd = before * gn, before * gd
            before, now, _ = _scales(m, u + k[:, t])
            below = before * d + now
            dn = dy[:, t] / below
            dd = -dn * (before * n + now * v[:, t]) / below
            du = now * (dn * v[:, t] + dd)
            gn, gd = gn + before * dn, gd + before * dd
            for grad, value in zip(grads, (dw, du, dk + du, dv + now * dn), strict=True):
                grad[:, t] = value
        return *grads, torch.stack([gn, gd, torch.zeros_like(gn)], 1)

    dw, du, dk, dv, first = _by_sequence(rows, (*tokens, dy), (state, dstate), lengths)
    return dw.sum(0), du.sum(0), dk, dv, first


def wkv6_forward(inputs: tuple[Tensor, ...], state: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """y = (S + v (u k)^T) r ; S <- S diag(e^w) + v k^T   (RWKV-5 and RWKV-6, arXiv:2404.05892, section 4).

    Args: inputs r, k, v, w, each (tokens, H, N), w the log decay, and u (H, N).
    """
    *tokens, u = inputs

    def rows(r: Tensor, k: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        y = torch.empty_like(v)
        for t in range(r.shape[1]):
            now = _outer(v[:, t], k[:, t])
            y[:, t] = _apply(s + now * u.unsqueeze(-2), r[:, t])
            s = s * w[:, t].exp().unsqueeze(-2) + now
        return y, s.clone()

    return _by_sequence(rows, tuple(tokens), (state,), lengths)


def wkv6_backward(
    inputs: tuple[Tensor, ...], state: Tensor, dy: Tensor, dstate: Tensor, lengths: list[int]
) -> tuple[Tensor, ...]:
    """Gradients of r, k, v, w, u and of the incoming states, given those of y and of the outgoing states."""
    *tokens, u = inputs

    def rows(r: Tensor, k: Tensor, v: Tensor, w: Tensor, dy: Tensor, s: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        states, grads = [s], [torch.empty_like(k) for _ in range(5)]
        for t in range(r.shape[1]):
            states.append(states[-1] * w[:, t].exp().unsqueeze(-2) + _outer(v[:, t], k[:, t]))
        for t in reversed(range(r.shape[1])):
            s, decay = states[t], w[:, t].exp()
            vdy = (v[:, t] * dy[:, t]).sum(-1, keepdim=True)
            values = (
                _apply(s.mT, dy[:, t]) + u * k[:, t] * vdy,
                _apply(g.mT, v[:, t]) + u * r[:, t] * vdy,
                _apply(g, k[:, t]) + (r[:, t] * u * k[:, t]).sum(-1, keepdim=True) * dy[:, t],
                decay * (s * g).sum(-2),
                r[:, t] * k[:, t] * vdy,
            )
            for grad, value in zip(grads, values, strict=True):
                grad[:, t] = value
            g = g * decay.unsqueeze(-2) + _outer(dy[:, t], r[:, t])
        return *grads, g.clone()

    *grads, du, first = _by_sequence(rows, (*tokens, dy), (state, dstate), lengths)
    return *grads, du.sum(0), first


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


def _scales(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e^left and e^right over the larger of the two, and its exponent."""
    top = torch.maximum(left, right)
    return (left - top).exp(), (right - top).exp(), top


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _by_sequence(
    rows: Callable[..., tuple[Tensor, ...]], tokens: tuple[Tensor, ...], states: tuple[Tensor, ...], lengths: list[int]
) -> tuple[Tensor, ...]:
    """Run `rows` on (rows, T, ...) tensors: all sequences at once if they are equally long, else one by one."""
    if len(set(lengths)) <= 1:
        out = rows(*(x.unflatten(0, (len(lengths), max(lengths, default=0))) for x in tokens), *states)
        return *(x.flatten(0, 1) for x in out[:-1]), out[-1]
    parts, begin = [], 0
    for i, n in enumerate(lengths):
        parts.append(rows(*(x[begin : begin + n].unsqueeze(0) for x in tokens), *(s[i : i + 1] for s in states)))
        begin += n
    columns = list(zip(*parts, strict=True))
    return *(torch.cat(x, 1).squeeze(0) for x in columns[:-1]), torch.cat(columns[-1])
