"""What convert and the readers of weights and states refuse, each with a line that says what to do."""

import json
from pathlib import Path

import pytest
import torch
from tiny import random_state, run, tiny_model

import infctx
from infctx.checkpoint import save_checkpoint
from infctx.statefile import load_state, save_state
from infctx.weights import read_model


def failing(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *argv)
    message = capsys.readouterr().err
    assert end.value.code == 2 and 0 < len(message.splitlines()) <= 5, message
    return message


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("rwkv7", torch.float32, n_embd=128, head_size=64)
    infctx.save_model(model, "a.pth")
    return model


def test_damaged_checkpoint_by_its_own_folder(model, monkeypatch, capsys):
    save_checkpoint("ck", model.state_dict(), {}, {})
    file = Path("ck/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "damaged" in failing(monkeypatch, capsys, "convert", "ck", "b.pth")


@pytest.mark.parametrize(("key", "value"), [("norm_eps", 1e-3), ("hidden_act", "gelu"), ("tie_word_embeddings", True)])
def test_folder_of_another_kind_of_model(model, monkeypatch, capsys, tmp_path, key, value):
    infctx.save_model(model, "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
    assert f"{key} is" in failing(monkeypatch, capsys, "convert", "hf", "b.pth")


def test_numbers_that_a_dtype_cannot_hold(model, monkeypatch, capsys, tmp_path):
    torch.save({name: x * 1e7 for name, x in model.state_dict().items()}, "big.pth")
    assert "take bfloat16" in failing(monkeypatch, capsys, "convert", "big.pth", "b.pth", "--dtype", "float16")
    assert not (tmp_path / "b.pth").exists()
    torch.save({name: x * torch.nan for name, x in model.state_dict().items()}, "nan.pth")
    assert "do not use it" in failing(monkeypatch, capsys, "convert", "nan.pth", "b.pth", "--verify")


def test_small_float16_numbers_that_no_scale_leaves_alone(model, monkeypatch, capsys):
    small = tiny_model("rwkv7", torch.float32, n_embd=128, head_size=16).half()
    with torch.no_grad():
        small.blocks[0].att.receptance.weight.fill_(6e-8)
    infctx.save_model(small, "small.pth")
    assert "cannot be scaled exactly" in failing(monkeypatch, capsys, "convert", "small.pth", "hf")


def test_tied_head_is_written_twice(model, monkeypatch):
    weights = model.state_dict()
    weights["head.weight"] = weights["emb.weight"]
    torch.save(weights, "tied.pth")
    for dst in ("folder-0.1b", "t.safetensors"):
        run(monkeypatch, "convert", "tied.pth", dst)
        again = read_model(dst)[1]
        assert torch.equal(again["head.weight"], weights["emb.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(2)}, "expected names"),
        ({"emb.weight": torch.zeros(2, 2).to_sparse()}, "dense"),
        ({"emb.weight": torch.zeros(2, 2, dtype=torch.int8)}, "dense float32"),
    ],
)
def test_tensors_of_other_kinds(model, monkeypatch, capsys, content, message):
    torch.save(content, "odd.pth")
    assert message in failing(monkeypatch, capsys, "convert", "odd.pth", "b.pth")


def test_mixed_dtypes_need_a_choice(model, monkeypatch, capsys):
    weights = model.state_dict()
    torch.save({name: x.bfloat16() if "key" in name else x for name, x in weights.items()}, "mixed.pth")
    command = ("generate", "mixed.pth", "--prompt", "a", "--tokenizer", "bytes")
    assert "say which dtype" in failing(monkeypatch, capsys, *command)


def test_states_of_other_models(model, tmp_path):
    save_state(random_state(model, 1), "s.safetensors", {"arch": "rwkv6"})
    with pytest.raises(ValueError, match="a state of rwkv6, the model is rwkv7"):
        load_state("s.safetensors", model)
    gold = tiny_model("goldfinch", torch.float32)
    state = random_state(gold, 1)
    for memory in (
        state.memory._replace(tokens=state.memory.tokens + 99),
        state.memory._replace(cu_seqlens=torch.tensor([0, 999]).int()),
    ):
        save_state(state._replace(memory=memory), "g.safetensors")
        with pytest.raises(ValueError, match="memory does not fit"):
            load_state("g.safetensors", gold)


def test_a_failed_write_leaves_the_old_state(model, monkeypatch, tmp_path):
    save_state(random_state(model, 1), "s.pth")
    before = (tmp_path / "s.pth").read_bytes()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos")

    monkeypatch.setattr("infctx.statefile.torch.save", full)
    with pytest.raises(OSError, match="not written"):
        save_state(random_state(model, 1), "s.pth")
    assert (tmp_path / "s.pth").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_the_tokenizer_is_that_of_the_vocabulary(model, monkeypatch, capsys):
    assert "no vocabulary of 50 ids" in failing(monkeypatch, capsys, "generate", "a.pth", "--prompt", "a")
    run(monkeypatch, "init", "w.pth", "--n_layer", "1", "--n_embd", "64", "--vocab_size", "65536")
    run(monkeypatch, "generate", "w.pth", "--prompt", "Hello there", "--max_tokens", "3")
    assert "Hello there" in capsys.readouterr().out
