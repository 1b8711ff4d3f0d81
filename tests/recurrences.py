"""Inputs of the recurrences, and what they must give: the papers' formulas, differentiated by autograd."""

import torch

from infctx import ops

PACKED = [5, 0, 35, 1, 99, 64, 0]
OPS = {"wkv4": ops.wkv4, "wkv6": ops.wkv6, "wkv7": ops.wkv7}
CONSTANTS = {"wkv4": (0, 1), "wkv6": (4,), "wkv7": ()}  # inputs without a token axis


def inputs(name, b, t, h=3, n=16, dtype=torch.float64, sequences=None, lowest=-0.6065, seed=0):
    g = torch.Generator().manual_seed(seed)
    r, k, v, w, kk, rate = (torch.randn(b, t, h, n, generator=g, dtype=torch.float64) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    state = torch.randn(sequences or b, h, n, n, generator=g, dtype=torch.float64)
    u, w = torch.randn(h, n, generator=g, dtype=torch.float64), lowest * torch.sigmoid(3 * w)
    if name == "wkv4":
        w = lowest * torch.sigmoid(3 * torch.randn(h * n, generator=g, dtype=torch.float64))
        state = torch.randn(sequences or b, 3, h * n, generator=g, dtype=torch.float64)
        state[:, 1] = state[:, 1].exp()
        tensors = [w, u.flatten(), 2 * k.flatten(2), v.flatten(2)]
    else:
        tensors = {"wkv6": [r, k, v, w, u], "wkv7": [r, w, k, v, -kk, kk * torch.sigmoid(rate)]}[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype).requires_grad_() for x in tensors] + [state.to(wide).requires_grad_()]


def step4(state, w, u, k, v):
    n, d = state
    y = (n + (u + k).exp() * v) / (d + (u + k).exp())
    return torch.stack([w.exp() * n + k.exp() * v, w.exp() * d + k.exp()]), y


def step6(s, r, k, v, w, u):
    now = torch.einsum("hv,hk->hvk", v, k)
    return s * w.exp()[:, None] + now, torch.einsum("hvk,hk->hv", s + u[:, None] * now, r)


def step7(s, r, w, k, v, a, b):
    move = torch.diag_embed(w.exp()) + torch.einsum("hi,hj->hij", a, b)
    s = torch.einsum("hvk,hkj->hvj", s, move) + torch.einsum("hv,hk->hvk", v, k)
    return s, torch.einsum("hvk,hk->hv", s, r)


def transcription(name, *args, cu_seqlens=None):
    """The recurrence as the paper has it, token by token, differentiated by autograd."""
    *tensors, state = args
    v = next(x for i, x in reversed(list(enumerate(tensors))) if i not in CONSTANTS[name])
    step = {"wkv4": step4, "wkv6": step6, "wkv7": step7}[name]
    if name == "wkv4":
        state = state[:, :2] * state[:, 2:].detach().exp()
    rows, states = [], []
    borders = [(i, 0, v.shape[1], i) for i in range(v.shape[0])]
    if cu_seqlens is not None:
        borders = [(0, int(x), int(y), i) for i, (x, y) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:]))]
    for row, begin, end, i in borders:
        s, ys = state[i], []
        for t in range(begin, end):
            s, y = step(s, *(x if j in CONSTANTS[name] else x[row, t] for j, x in enumerate(tensors)))
            ys.append(y)
        rows.append(torch.stack(ys) if ys else v[row, :0])
        states.append(s)
    y = torch.stack(rows) if cu_seqlens is None else torch.cat(rows).unsqueeze(0)
    return y, torch.stack(states)


def true_state(state):
    """RWKV-4 keeps n, d and an exponent: what they stand for."""
    return state[:, :2] * state[:, 2:].detach().exp() if state.dim() == 3 and state.shape[1] == 3 else state


def everything(function, args, **options):
    """Outputs and all gradients, with a loss on both outputs."""
    y, state = function(*args, **options)
    state = true_state(state)
    weights = [
        torch.linspace(-1, 2, max(1, x.numel()), dtype=torch.float64)[: x.numel()].view(x.shape) for x in (y, state)
    ]
    grads = torch.autograd.grad([y, state], args, [x.to(o) for x, o in zip(weights, (y, state))], allow_unused=True)
    return [y, state, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, args))]


def expected(name, args, **options):
    return everything(lambda *x, **o: transcription(name, *x, **o), args, **options)
