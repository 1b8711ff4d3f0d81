"""Law 8: logits, states and gradients equal those of implementations that are not ours."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from tiny import ARCHS, law, random_state, relative, tiny_model, values, worst
from transcription import run as transcribe

import infctx
from infctx.layouts import to_layout
from infctx.state import BlockState, KeyMemory, State
from infctx.statefile import from_runtime, save_state, to_runtime

PACKAGE = ["rwkv4", "rwkv5.0", "rwkv5.0r2", "rwkv5.1", "rwkv5", "rwkv6", "rwkv7", "rwkv7a"]
SIZES = [dict(n_layer=2), dict(n_layer=3, n_embd=64), dict(n_embd=128, head_size=64), dict(n_embd=64, head_size=8)]


def ask(folder: Path, arch: str, questions: list[dict]) -> list[dict]:
    """What the rwkv package makes of weight files."""
    torch.save(questions, folder / "questions.pt")
    script = str(Path(__file__).with_name("rwkv_package.py"))
    command = [sys.executable, script, str(folder / "questions.pt"), str(folder / "answers.pt")]
    flags = {"RWKV_V7_ON": str(int("rwkv7" in arch)), "RWKV_DE_VERSION": str(int(arch == "rwkv7a"))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "answers.pt", weights_only=True)


def doubled(state: State | None) -> State | None:
    if state is None:
        return None
    memory = state.memory and state.memory._replace(keys=state.memory.keys.double())
    return State(tuple(BlockState(*(x.double() for x in block)) for block in state.blocks), memory)


def transcription(model, tokens: list[int], state: State | None) -> tuple[torch.Tensor, State]:
    """Logits (T, vocab) and state of the test's own float64 transcription of the papers."""
    given = None
    if state is not None:
        given = [{name: x[0] for name, x in block._asdict().items()} for block in doubled(state).blocks]
        if state.memory:
            given.append({"tokens": state.memory.tokens.tolist(), "keys": state.memory.keys.double()})
    arch = model.config.arch.replace("r2", "")
    logits, after = transcribe(arch, dict(model.state_dict()), tokens, given)
    memory = None
    if model.config.n_gold:
        last = after.pop()
        borders = torch.tensor([0, len(last["tokens"])]).int()
        memory = KeyMemory(torch.tensor(last["tokens"]).int(), last["keys"], borders)
    return logits, State(tuple(BlockState(*(b[x][None] for x in BlockState._fields)) for b in after), memory)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", range(4))
def test_float64_equals_the_transcription(arch, case, record_property):
    """Weights of large spread, a non-zero state, whole, split and token by token."""
    model = tiny_model(arch, spread=0.5, **SIZES[case])
    ids = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(case))
    start = random_state(model, 1, case) if case else None
    logits, after = transcription(model, ids[0].tolist(), start)
    for cuts in ([40], [17, 23], [1] * 40):
        pieces, state = [], start
        for piece in ids.split(cuts, 1):
            out, state = model(piece, state)
            pieces.append(out[0])
        law(record_property, 8, arch, worst([torch.cat(pieces), *values(state)], [logits, *values(after)]), 1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_equal_those_of_the_transcription(arch, record_property):
    """Of every parameter, through three pieces and their states."""
    model = tiny_model(arch, spread=0.5)
    ids = torch.randint(50, (1, 30), generator=torch.Generator().manual_seed(0))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    pieces, state = [], None
    for piece in ids.split([7, 22, 1], 1):
        out, state = model(piece, state)
        pieces.append(out[0])
    theirs, _ = transcribe(arch.replace("r2", ""), dict(model.named_parameters()), ids[0].tolist())
    weight = torch.linspace(-1, 1, theirs.numel(), dtype=theirs.dtype).view_as(theirs)
    parameters = [model.get_parameter(name) for name in names]
    ours, expected = (torch.autograd.grad((x * weight).sum(), parameters) for x in (torch.cat(pieces), theirs))
    law(record_property, 8, arch, worst(ours, expected), 1e-9)


@pytest.mark.parametrize("arch", [x if x == "rwkv7" else pytest.param(x, marks=pytest.mark.slow) for x in PACKAGE])
def test_float32_is_as_good_as_the_rwkv_package(tmp_path, arch):
    """Errors against the float64 transcription, ours beside those of the package."""
    questions, cases = [], []
    for seed in range(6):
        model = tiny_model(arch, torch.float32, spread=0.25, **SIZES[seed % len(SIZES)])
        state = random_state(model, 1, seed) if seed else None
        tokens = torch.randint(50, (1, 48), generator=torch.Generator().manual_seed(seed))[0].tolist()
        infctx.save_model(model, tmp_path / f"{seed}.pth")
        file = tmp_path / (str(seed) if "rwkv7" in arch else f"{seed}.pth")
        pieces = {"whole": [tokens], "split": [tokens[:17], tokens[17:]], "steps": [[t] for t in tokens]}
        flat = to_runtime(state, arch) if state else None
        questions.append({"model": str(file), "state": flat, "pieces": pieces})
        cases.append((model, state, tokens, *transcription(model, tokens, state)))
    errors = []
    for answer, question, (model, state, _, logits, after) in zip(ask(tmp_path, arch, questions), questions, cases):
        for name, pieces in question["pieces"].items():
            rows, own = [], state
            for piece in pieces:
                out, own = model(torch.tensor([piece]), own)
                rows.append(out[0])
            errors.append((relative(torch.cat(rows), logits), relative(answer[name]["logits"], logits)))
            exact = values(after)
            states = worst(values(own), exact), worst(values(from_runtime(answer[name]["state"], arch)), exact)
            for ours, theirs in (errors[-1], states):
                assert ours <= 3 * theirs + 1e-6, (name, ours, theirs)
    ours, theirs = (median(x) for x in zip(*errors))
    print(f"{arch}: median error {ours:.1e}, the package's {theirs:.1e}; worst {max(errors)[0]:.1e}")
    assert ours <= 2e-6


@pytest.mark.parametrize("arch", ["rwkv5", "rwkv6", "rwkv7"])
def test_state_files_run_in_the_rwkv_package(tmp_path, arch):
    """A time_state file merged into the weights (5, 6), as runtimes do it, and read as it is (7)."""
    model = tiny_model(arch, torch.float32)
    empty, state = model.initial_state(1), random_state(model, 1)
    state = State(tuple(e._replace(wkv=s.wkv) for e, s in zip(empty.blocks, state.blocks)))
    save_state(state, tmp_path / "state.pth")
    matrices = torch.load(tmp_path / "state.pth", weights_only=True)
    tokens = list(range(1, 20))
    torch.save(model.state_dict() | ({} if arch == "rwkv7" else matrices), tmp_path / "m.pth")
    # The package transposes what it finds in the weights of RWKV-5 and 6; a runtime of RWKV-7 takes the file as it is.
    flat = None
    if arch == "rwkv7":
        flat = [x for i in range(2) for x in (torch.zeros(32), matrices[f"blocks.{i}.att.time_state"], torch.zeros(32))]
    file = str(tmp_path / "m") if arch == "rwkv7" else str(tmp_path / "m.pth")
    (answer,) = ask(tmp_path, arch, [{"model": file, "state": flat, "pieces": {"whole": [tokens]}}])
    assert relative(answer["whole"]["logits"], model(torch.tensor([tokens]), state)[0][0]) < 5e-6
    assert relative(answer["whole"]["logits"], model(torch.tensor([tokens]))[0][0]) > 1e-2


def test_gradients_and_states_equal_those_of_transformers():
    """RWKV-4, from a non-zero state."""
    from transformers import RwkvConfig, RwkvForCausalLM

    model = tiny_model("rwkv4", torch.float32)
    c = model.config
    sizes = dict(vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer, rescale_every=0)
    peer = RwkvForCausalLM(RwkvConfig(**sizes, intermediate_size=c.dim_ffn)).train()
    peer.load_state_dict(to_layout(model.state_dict(), c)[0], strict=True)
    tokens = torch.randint(1, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    state = random_state(model, 2)
    columns = [(b.ffn_shift, b.att_shift, *b.wkv.unbind(1)) for b in state.blocks]
    with torch.no_grad():
        theirs = peer(tokens, state=[torch.stack(x, -1) for x in zip(*columns)], use_cache=True)
    ours, after = model(tokens, state)
    assert relative(ours, theirs.logits) < 2e-6
    for i, block in enumerate(after.blocks):
        ffn, att, *wkv = (x[..., i] for x in theirs.state)
        peers = State((BlockState(att, ffn, torch.stack(wkv, 1)),))
        assert worst(values(State((block,))), values(peers)) < 5e-6
    # Its gradient cannot be taken with a state: the package writes into it.
    ours, theirs = model(tokens)[0], peer(tokens, use_cache=False)
    weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    (ours * weight).sum().backward()
    (theirs.logits * weight).sum().backward()
    grads = to_layout({name: p.grad for name, p in model.named_parameters()}, c)[0]
    for name, p in peer.named_parameters():
        assert relative(grads[name], p.grad) < 2e-5, name


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
