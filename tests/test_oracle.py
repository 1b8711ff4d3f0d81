"""Law 8: logits, states and gradients equal those of implementations that are not ours."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_state, relative, tiny_model

import infctx
from infctx.state import BlockState, State


def ask(folder: Path, model, tokens, state, pieces):
    """What the rwkv package makes of a model that infctx exported."""
    infctx.save_model(model, folder / "model.pth")
    flat = [x[0] for b in state.blocks for x in (b.att_shift, b.wkv, b.ffn_shift)] if state else None
    torch.save({"state": flat, "pieces": pieces}, folder / "question.pt")
    script = Path(__file__).with_name("rwkv_package.py")
    command = [sys.executable, str(script), *(str(folder / x) for x in ("model", "question.pt", "answer.pt"))]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(folder / "answer.pt", weights_only=True)


@pytest.mark.parametrize("seed", range(3))
def test_exported_model_in_the_rwkv_package(tmp_path, seed):
    sizes = [dict(n_layer=1), dict(n_layer=3, n_embd=64), dict(n_embd=128, head_size=64)][seed]
    model = tiny_model("rwkv7", torch.float32, **sizes)
    tokens = torch.randint(50, (1, 48), generator=torch.Generator().manual_seed(seed))[0].tolist()
    state = random_state(model, 1, seed) if seed else None
    cuts = {"whole": [tokens], "split": [tokens[:17], tokens[17:]], "steps": [[t] for t in tokens]}
    theirs = ask(tmp_path, model, tokens, state, cuts)
    double = infctx.load_model(tmp_path / "model.pth", torch.float64)
    exact = None
    if state:
        exact = State(tuple(BlockState(*(x.double() for x in block)) for block in state.blocks))
    logits, after = model(torch.tensor([tokens]), state)
    best, last = double(torch.tensor([tokens]), exact)
    assert relative(logits[0], best[0]) < 2e-6
    for name, answer in theirs.items():
        print(
            f"seed {seed}, {name}: logits of the rwkv package against ours {relative(answer['logits'], logits[0]):.1e}"
        )
        assert relative(answer["logits"], logits[0]) < 1e-5, name
        assert relative(answer["logits"], best[0]) < 1e-5, name
        for block, ours in enumerate(after.blocks):
            att, wkv, ffn = answer["state"][3 * block : 3 * block + 3]
            assert relative(att, ours.att_shift[0]) < 1e-5
            assert relative(wkv, ours.wkv[0]) < 1e-5
            assert relative(ffn, ours.ffn_shift[0]) < 1e-5


def to_rwkv7_hf(weights, n_layer):
    """Published names to those of flash-linear-attention's layout, which rwkv7-hf reads."""
    out = {"model.embeddings.weight": weights["emb.weight"], "lm_head.weight": weights["head.weight"]}
    for part in ("weight", "bias"):
        out[f"model.norm.{part}"] = weights[f"ln_out.{part}"]
        out[f"model.layers.0.pre_norm.{part}"] = weights[f"blocks.0.ln0.{part}"]
    names = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    for i in range(n_layer):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        for part in ("weight", "bias"):
            out[f"{layer}.attn_norm.{part}"] = weights[f"{block}.ln1.{part}"]
            out[f"{layer}.ffn_norm.{part}"] = weights[f"{block}.ln2.{part}"]
            out[f"{layer}.attn.g_norm.{part}"] = weights[f"{block}.att.ln_x.{part}"]
        for ours, theirs in names.items():
            out[f"{layer}.attn.{theirs}.weight"] = weights[f"{block}.att.{ours}.weight"]
        for x in "rwkvag":
            out[f"{layer}.attn.x_{x}"] = weights[f"{block}.att.x_{x}"]
        for x in ("k_k", "k_a"):
            out[f"{layer}.attn.{x}"] = weights[f"{block}.att.{x}"].flatten()
        out[f"{layer}.attn.r_k"] = weights[f"{block}.att.r_k"]
        for x in "wavg":
            if x == "v" and i == 0:
                continue
            out[f"{layer}.attn.{x}_lora.lora.0.weight"] = weights[f"{block}.att.{x}1"].T
            out[f"{layer}.attn.{x}_lora.lora.2.weight"] = weights[f"{block}.att.{x}2"].T
            if x != "g":
                out[f"{layer}.attn.{x}_lora.lora.2.bias"] = weights[f"{block}.att.{x}0"].flatten()
        out[f"{layer}.ffn.x_k"] = weights[f"{block}.ffn.x_k"].flatten()
        for x in ("key", "value"):
            out[f"{layer}.ffn.{x}.weight"] = weights[f"{block}.ffn.{x}.weight"]
    return out


def test_gradients_equal_those_of_rwkv7_hf():
    from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM

    model = tiny_model("rwkv7", torch.float32, n_embd=128, head_size=64)
    c, r = model.config, model.config.ranks
    config = RWKV7Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.dim_ffn, num_hidden_layers=c.n_layer,
        head_dim=c.head_size, decay_low_rank_dim=r["w"], a_low_rank_dim=r["a"], v_low_rank_dim=r["v"],
        gate_low_rank_dim=r["g"],
    )  # fmt: skip
    peer = RWKV7ForCausalLM(config)
    peer.load_state_dict(to_rwkv7_hf(model.state_dict(), c.n_layer), strict=True)
    tokens = torch.randint(1, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    # Id 0 is padding to the peer: its embedding gets no gradient there.
    ours, theirs = model(tokens)[0], peer(input_ids=tokens).logits
    assert relative(ours, theirs) < 2e-6
    weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    expected = dict(peer.named_parameters())
    for name, grad in to_rwkv7_hf(grads, c.n_layer).items():
        assert relative(grad, expected[name].grad) < 1e-4, name
