"""Oracle: the published equations of every architecture, written out one token after another in float64.

Nothing here comes from the package under test. It is slow and literal on purpose: one document, no batch, a Python loop
over tokens wherever an equation has a subscript t. Autograd works through all of it, also into the incoming state.

RWKV-4: Peng et al. 2023, arXiv:2305.13048. RWKV-5 (Eagle) and 6 (Finch): Peng et al. 2024, arXiv:2404.05892; 5.0 and
5.1 are published previews of Eagle. RWKV-7 (Goose): Peng et al. 2025, arXiv:2503.14456; 7a (DeepEmbed) has released
weights and code but no paper. GoldFinch: Goldstein et al. 2024, arXiv:2407.12077.

T tokens of this call, M tokens before it, C channels, H heads, V value and K key channels of a head, both N = C / H.
`x` is the normalised input of a mixer (T, C), `prev` the same one token earlier; `p` its weights by their short names.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def run(arch: str, weights: Weights, tokens: list[int], state: list | None = None) -> tuple[Tensor, list]:
    """Logits (T, vocab) and the state after the last token.

    State: per layer {"att_shift": (C,), "ffn_shift": (C,), "wkv": ...}. wkv is (H, V, K); for RWKV-4 (3, C), namely
    numerator and denominator, both still to be multiplied by exp of the third row; for GOLD layers empty. GoldFinch
    adds one last element {"tokens": ids of the whole document, "keys": (M + T, C / 16)}.
    """
    w = {name: t.double().flatten() if t.shape[:2] == (1, 1) else t.double() for name, t in weights.items()}
    n_layer = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    ln0 = part(w, "blocks.0.ln0.")
    past = list(state[n_layer]["tokens"]) if arch == "goldfinch" and state else []
    ids = past + list(tokens)
    embedded = layer_norm(w["emb.weight"][ids], ln0)  # (M + T, C): x0, the input of the first layer
    shared = {"embedded": embedded, "ids": ids}  # what a layer may know beside its own input
    x = embedded[len(past) :]
    after = []
    for i in range(n_layer):
        block, att, ffn = (part(w, f"blocks.{i}.{name}") for name in ("", "att.", "ffn."))
        is_gold = "time_maa_q" in att
        if is_gold and "k_cache" not in shared:
            shared["k_cache"], keys = token_cat(w, x, embedded, state[n_layer]["keys"] if state else None)
        if "time_faaaa" in att:
            shared["n_head"] = att["time_faaaa"].shape[0]
        before = state[i] if state else fresh(arch, att, x.shape[1])
        time_mix = gold_attention if is_gold else TIME_MIX[arch]

        xa = layer_norm(x, part(block, "ln1."))
        y, wkv = time_mix(att, xa, shifted(xa, before["att_shift"]), before["wkv"].double(), shared)
        x = x + y
        xf = layer_norm(x, part(block, "ln2."))
        x = x + CHANNEL_MIX[arch](ffn, xf, shifted(xf, before["ffn_shift"]), shared)
        after.append({"att_shift": xa[-1], "ffn_shift": xf[-1], "wkv": wkv})
    if arch == "goldfinch":
        after.append({"tokens": ids, "keys": keys})
    return linear(w, "head", layer_norm(x, part(w, "ln_out."))), after


def fresh(arch: str, att: Weights, n_embd: int) -> dict[str, Tensor]:
    """A layer's state before the first token of a document: zeros; the empty sums of RWKV-4 are 0 * exp(-1e38)."""
    zeros = torch.zeros(n_embd, dtype=torch.float64)
    if arch == "rwkv4":
        wkv = torch.stack([zeros, zeros, zeros - 1e38])
    elif "time_maa_q" in att:
        wkv = zeros[:0]
    else:
        n_head = next(att[name] for name in ("r_k", "time_faaaa", "time_decay") if name in att).shape[0]
        wkv = zeros.new_zeros(n_head, n_embd // n_head, n_embd // n_head)
    return {"att_shift": zeros, "ffn_shift": zeros, "wkv": wkv}


def part(w: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: t for name, t in w.items() if name.startswith(prefix)}


def linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T


def standardized(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, p: Weights) -> Tensor:
    return standardized(x, 1e-5) * p["weight"] + p["bias"]


def head_norm(y: Tensor, p: Weights) -> Tensor:
    """(T, H, N) to (T, C): each head normalised by itself. eps is 1e-5 for y / 8, thus 64e-5 for y, whatever N is."""
    return standardized(y, 64e-5).flatten(1) * p["ln_x.weight"] + p["ln_x.bias"]


def rms_norm(x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + 1e-8)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def shifted(x: Tensor, before: Tensor | None = None) -> Tensor:
    """x one token earlier; `before` precedes the first."""
    before = torch.zeros_like(x[0]) if before is None else before.double()
    return torch.cat([before[None], x[:-1]])


def heads(x: Tensor, n_head: int) -> Tensor:
    return x.view(len(x), n_head, -1)


def lerp(x: Tensor, prev: Tensor, mix: Tensor) -> Tensor:
    """Token shift of RWKV-4 and 5: a mix of 1 is all of the current token. RWKV-6 and 7 count from the other side."""
    return mix * x + (1 - mix) * prev


def shifted_rkv(p: Weights, x: Tensor, prev: Tensor) -> list[Tensor]:
    """Receptance, key and value of RWKV-4 and 5."""
    return [linear(p, name, lerp(x, prev, p[f"time_mix_{name[0]}"])) for name in ("receptance", "key", "value")]


def time_mix_4(p: Weights, x: Tensor, prev: Tensor, wkv: Tensor, shared: dict) -> tuple[Tensor, Tensor]:
    """arXiv:2305.13048, token shift, WKV operator, output gating; the sums as in its appendix on the RNN cell.

    wkv_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v), w = -e^{time_decay}.
    """
    r, k, v = shifted_rkv(p, x, prev)
    decay, bonus = -torch.exp(p["time_decay"]), p["time_first"]
    num, den, exponent = wkv
    ys = []
    for t in range(len(x)):
        top = torch.maximum(exponent, bonus + k[t])
        old, new = torch.exp(exponent - top), torch.exp(bonus + k[t] - top)
        ys.append((old * num + new * v[t]) / (old * den + new))
        top = torch.maximum(exponent + decay, k[t])
        old, new = torch.exp(exponent + decay - top), torch.exp(k[t] - top)
        num, den, exponent = old * num + new * v[t], old * den + new, top
    return linear(p, "output", torch.sigmoid(r) * torch.stack(ys)), torch.stack([num, den, exponent])


def channel_mix_4(p: Weights, x: Tensor, prev: Tensor, shared: dict) -> Tensor:
    """arXiv:2305.13048, channel mixing: sigmoid(r) * value(relu(k)^2); unchanged in RWKV-5."""
    r = linear(p, "receptance", lerp(x, prev, p["time_mix_r"]))
    k = linear(p, "key", lerp(x, prev, p["time_mix_k"]))
    return torch.sigmoid(r) * linear(p, "value", torch.relu(k) ** 2)


def linear_attention(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv:2404.05892, the recurrent form of the WKV attention of Eagle (w constant) and Finch (w of each token).

    y_t = (S_{t-1} + v_t (u k_t)^T) r_t, S_t = S_{t-1} diag(w_t) + v_t k_t^T. r k v w (T, H, N), u (H, N), S (H, V, K).
    """
    ys = []
    for t in range(len(r)):
        bonus = torch.einsum("hv,hk->hvk", v[t], u * k[t])
        ys.append(torch.einsum("hvk,hk->hv", s + bonus, r[t]))
        s = s * w[t][:, None, :] + torch.einsum("hv,hk->hvk", v[t], k[t])
    return torch.stack(ys), s


def time_mix_5(p: Weights, x: Tensor, prev: Tensor, wkv: Tensor, shared: dict) -> tuple[Tensor, Tensor]:
    """arXiv:2404.05892, Eagle time mixing. 5.0 and 5.1 have one decay and one bonus for a head, 5.0 has no gate."""
    n_head = p["time_decay"].shape[0]
    r, k, v = (heads(z, n_head) for z in shifted_rkv(p, x, prev))
    u = p["time_faaaa"] if "time_faaaa" in p else torch.exp(p["time_first"])
    u, w = u.view(n_head, -1), torch.exp(-torch.exp(p["time_decay"])).view(n_head, -1)
    y, wkv = linear_attention(r, k, v, w.expand_as(r), u, wkv)
    y = head_norm(y, p)
    if "gate.weight" in p:
        y = y * silu(linear(p, "gate", lerp(x, prev, p["time_mix_g"])))
    return linear(p, "output", y), wkv


def ddlerp(p: Weights, x: Tensor, prev: Tensor, names: list[str]) -> list[Tensor]:
    """arXiv:2404.05892, Finch token shift: the mix of each name is its constant plus a low-rank function of the input.

    `time_maa_w1` (C, n D) holds the n first factors side by side, `time_maa_w2` (n, D, C) the second ones.
    """
    dx = prev - x
    low = torch.tanh((x + dx * p["time_maa_x"]) @ p["time_maa_w1"]).chunk(len(names), dim=1)
    return [x + dx * (p[f"time_maa_{n}"] + low[i] @ p["time_maa_w2"][i]) for i, n in enumerate(names)]


def finch_decay(p: Weights, xw: Tensor) -> Tensor:
    """arXiv:2404.05892, Finch: w_t = exp(-exp(d_t)), d_t a constant plus a low-rank function of the token."""
    return torch.exp(-torch.exp(p["time_decay"] + torch.tanh(xw @ p["time_decay_w1"]) @ p["time_decay_w2"]))


def time_mix_6(p: Weights, x: Tensor, prev: Tensor, wkv: Tensor, shared: dict) -> tuple[Tensor, Tensor]:
    """arXiv:2404.05892, Finch time mixing."""
    n_head = p["time_faaaa"].shape[0]
    xw, xk, xv, xr, xg = ddlerp(p, x, prev, ["w", "k", "v", "r", "g"])
    r, k, v = linear(p, "receptance", xr), linear(p, "key", xk), linear(p, "value", xv)
    r, k, v, w = (heads(z, n_head) for z in (r, k, v, finch_decay(p, xw)))
    y, wkv = linear_attention(r, k, v, w, p["time_faaaa"], wkv)
    return linear(p, "output", head_norm(y, p) * silu(linear(p, "gate", xg))), wkv


def channel_mix_6(p: Weights, x: Tensor, prev: Tensor, shared: dict) -> Tensor:
    """arXiv:2404.05892, Finch channel mixing, which GoldFinch keeps."""
    k = linear(p, "key", x + (prev - x) * p["time_maa_k"])
    r = linear(p, "receptance", x + (prev - x) * p["time_maa_r"])
    return torch.sigmoid(r) * linear(p, "value", torch.relu(k) ** 2)


def time_mix_7(p: Weights, x: Tensor, prev: Tensor, wkv: Tensor, shared: dict) -> tuple[Tensor, Tensor]:
    """arXiv:2503.14456, Goose time mixing: S_t = S_{t-1} (diag(w_t) - kk_t (a_t kk_t)^T) + v_t k_t^T, y_t = S_t r_t."""
    n_head = p["r_k"].shape[0]
    xr, xw, xk, xv, xa, xg = (x + (prev - x) * p[f"x_{name}"] for name in "rwkvag")
    r, k, v = linear(p, "receptance", xr), linear(p, "key", xk), linear(p, "value", xv)
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"]))
    a = torch.sigmoid(p["a0"] + xa @ p["a1"] @ p["a2"])  # the in-context learning rate
    g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
    if "v_first" not in shared:
        shared["v_first"] = v
    else:
        v = v + (shared["v_first"] - v) * torch.sigmoid(p["v0"] + xv @ p["v1"] @ p["v2"])
    kk = heads(k * p["k_k"], n_head)  # the key to remove
    kk = kk / torch.linalg.vector_norm(kk, dim=-1, keepdim=True).clamp(min=1e-12)
    k = k * (1 + (a - 1) * p["k_a"])  # the key to write
    r, k, v, w, a = (heads(z, n_head) for z in (r, k, v, w, a))
    s, ys = wkv, []
    for t in range(len(x)):
        removed = torch.einsum("hvk,hk->hv", s, kk[t])
        s = s * w[t][:, None, :]
        s = s - torch.einsum("hv,hk->hvk", removed, a[t] * kk[t]) + torch.einsum("hv,hk->hvk", v[t], k[t])
        ys.append(torch.einsum("hvk,hk->hv", s, r[t]))
    bonus = (r * k * p["r_k"]).sum(-1, keepdim=True) * v
    return linear(p, "output", (head_norm(torch.stack(ys), p) + bonus.flatten(1)) * g), s


def channel_mix_7(p: Weights, x: Tensor, prev: Tensor, shared: dict) -> Tensor:
    """arXiv:2503.14456, Goose MLP: no receptance."""
    return linear(p, "value", torch.relu(linear(p, "key", x + (prev - x) * p["x_k"])) ** 2)


def channel_mix_7a(p: Weights, x: Tensor, prev: Tensor, shared: dict) -> Tensor:
    """DeepEmbed, as in the released 7a weights: hidden channel j is multiplied by (s0 + ((x s1) E s2))_j.

    E (D, D) belongs to the token: its row of `s_emb` plus a linear map of its embedding. x is not shifted here.
    """
    k = torch.relu(linear(p, "key", x + (prev - x) * p["x_k"])) ** 2
    size = p["s1"].shape[1]
    scales = []
    for t, token in enumerate(shared["ids"]):
        e = p["s_emb.weight"][token] + linear(p, "s_emb_x", shared["embedded"][t])
        scales.append(p["s0"] + x[t] @ p["s1"] @ e.view(size, size) @ p["s2"])
    return linear(p, "value", k * torch.stack(scales))


def time_mix_finch_c2(p: Weights, x: Tensor, prev: Tensor, wkv: Tensor, shared: dict) -> tuple[Tensor, Tensor]:
    """arXiv:2407.12077, Finch-C2: Finch without gate and bonus, keys times (1 - w_t), a second value added after."""
    n_head = p["time_faaaa"].shape[0]
    xr, xk, xv, xw, xv2 = ddlerp(p, x, prev, ["r", "k", "v", "w", "v2"])
    w = finch_decay(p, xw)
    r, k, v = linear(p, "receptance", xr), linear(p, "key", xk) * (1 - w), linear(p, "value", xv)
    v2 = linear(p, "value", xv2) + torch.tanh(xv2 @ p["time_value2_w1"]) @ p["time_value2_w2"]
    y, wkv = linear_attention(*(heads(z, n_head) for z in (r, k, v, w)), torch.zeros_like(p["time_faaaa"]), wkv)
    return linear(p, "output", layer_norm(y.flatten(1) + v2, part(p, "ln_x."))), wkv


def token_cat(w: Weights, x: Tensor, embedded: Tensor, past_keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """arXiv:2407.12077, TokenCat: x compressed to C / 16 channels, which with the embedding make each key."""
    keys = linear(w, "w_kv_cache_a", x)
    if past_keys is not None:
        keys = torch.cat([past_keys.double(), keys])
    return rms_norm(linear(w, "w_kv_cache_b", torch.cat([embedded, keys], dim=1))), keys


def gold_attention(p: Weights, x: Tensor, prev: Tensor, wkv: Tensor, shared: dict) -> tuple[Tensor, Tensor]:
    """arXiv:2407.12077, GOLD: softmax attention over the whole document, keys from TokenCat, values from embeddings."""
    dx = prev - x
    mix = p["time_maa_q"] + torch.tanh((x + dx * p["time_maa_x"]) @ p["time_maa_q_w1"]) @ p["time_maa_q_w2"]
    q = layer_norm(linear(p, "query", x + dx * mix), part(p, "ln_q."))

    v, k = rms_norm(shared["embedded"]), shared["k_cache"]
    dv, dk = shifted(v) - v, shifted(k) - k
    low_k, low_v = torch.tanh((v + dv * p["time_maa_v_cache"]) @ p["time_maa_kv_w1"]).chunk(2, dim=1)
    k = k + dk * (p["time_maa_k"] + low_k @ p["time_maa_kv_w2"][0])
    v = v + dv * (p["time_maa_v"] + low_v @ p["time_maa_kv_w2"][1])
    k = layer_norm(k + torch.tanh(k @ p["time_key_w1"]) @ p["time_key_w2"], part(p, "ln_k."))
    v = layer_norm(v + torch.tanh(v @ p["time_value_w1"]) @ p["time_value_w2"], part(p, "ln_v."))

    q, k, v = (heads(z, shared["n_head"]) for z in (q, k, v))
    ys = []
    for t in range(len(q)):
        seen = len(k) - len(q) + t + 1  # the query's own position included
        scores = torch.einsum("hn,shn->hs", q[t], k[:seen]) / math.sqrt(q.shape[2])
        ys.append(torch.einsum("hs,shn->hn", torch.softmax(scores, dim=1), v[:seen]).flatten())
    return linear(p, "output", layer_norm(torch.stack(ys), part(p, "ln_x."))), wkv


FIVE = ("rwkv5.0", "rwkv5.1", "rwkv5")
TIME_MIX = {"rwkv4": time_mix_4, "rwkv6": time_mix_6, "rwkv7": time_mix_7, "rwkv7a": time_mix_7}
TIME_MIX |= dict.fromkeys(FIVE, time_mix_5) | {"goldfinch": time_mix_finch_c2}
CHANNEL_MIX = {"rwkv4": channel_mix_4, "rwkv6": channel_mix_6, "rwkv7": channel_mix_7, "rwkv7a": channel_mix_7a}
CHANNEL_MIX |= dict.fromkeys(FIVE, channel_mix_4) | {"goldfinch": channel_mix_6}
