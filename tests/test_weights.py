"""Weights come back as they were in every layout, files are whole or absent, and no file runs code."""

import json
import pickle
import random
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHS, relative, run, tiny_model

import infctx
from infctx.convert import compare
from infctx.layouts import PREFIXES, fla_scale
from infctx.weights import read_model

LAYOUTS = ["rwkv4", "rwkv5", "rwkv6", "rwkv7"]


def same(left, right):
    a, b = read_model(left)[1], read_model(right)[1]
    return list(a) == list(b) and all(torch.equal(a[x], b[x]) and a[x].dtype == b[x].dtype for x in a)


@pytest.mark.parametrize("arch", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face_round_trip_is_bit_equal(tmp_path, monkeypatch, arch, dtype):
    """.pth -> folder -> .safetensors -> folder -> .pth by the command, each step verified by it."""
    model = tiny_model(arch, dtype, n_embd=128, head_size=64)
    files = [str(tmp_path / name) for name in ("a.pth", "hf", "b.safetensors", "hf2", "c.pth")]
    infctx.save_model(model, files[0])
    for src, dst in zip(files, files[1:]):
        run(monkeypatch, "convert", src, dst, "--verify")
    assert all(same(files[0], other) for other in files[1:])
    assert infctx.load_model(files[1]).config == model.config


def test_transformers_reads_what_we_write(tmp_path):
    from transformers import RwkvForCausalLM

    model = tiny_model("rwkv4", torch.float32)
    infctx.save_model(model, tmp_path / "hf")
    peer, report = RwkvForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True, rescale_every=0)
    assert not any(report[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(1, 40).view(1, -1)
    assert relative(model(tokens)[0], peer(tokens).logits) < 2e-6
    peer.save_pretrained(tmp_path / "theirs")
    assert same(tmp_path / "hf", tmp_path / "theirs")


@pytest.mark.parametrize("size", [16, 64])
def test_rwkv7_hf_reads_what_we_write(tmp_path, size):
    """Its group norm has another epsilon at 16 channels a head: the weights make up for it."""
    from rwkv7_hf import RWKV7ForCausalLM

    model = tiny_model("rwkv7", torch.float32, n_embd=128, head_size=size)
    infctx.save_model(model, tmp_path / "hf")
    peer, report = RWKV7ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.model.layers[0].attn.g_norm.eps == pytest.approx(size * 1e-5)
    tokens = torch.arange(1, 40).view(1, -1)
    assert relative(model(tokens)[0], peer(input_ids=tokens).logits) < 2e-6
    infctx.save_model(infctx.load_model(tmp_path / "hf"), tmp_path / "back.pth")
    assert all(
        torch.equal(x, y) for x, y in zip(infctx.load_model(tmp_path / "back.pth").parameters(), model.parameters())
    )
    (tmp_path / "hf" / "unused.safetensors").unlink()  # as a folder that we did not write
    assert compare(tmp_path / "hf", tmp_path / "back.pth") == 0


@pytest.mark.parametrize("size", [32, 128])
def test_head_sizes_that_fla_cannot_have_exactly_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="group norm differs"):
        infctx.save_model(tiny_model("rwkv7", torch.float32, n_embd=128, head_size=size), tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and fla_scale(16) == 0.5


def test_packed_mixes_of_the_first_fla_files(tmp_path):
    model = tiny_model("rwkv7", torch.float32, n_embd=128, head_size=64)
    infctx.save_model(model, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    for i in range(2):
        rows = [weights.pop(f"model.layers.{i}.attn.x_{x}").flatten() for x in "rwkvag"]
        weights[f"model.layers.{i}.attn.x_x"] = torch.stack(rows)
    save_file(weights, tmp_path / "old.safetensors")
    assert compare(tmp_path / "old.safetensors", tmp_path / "hf") == 0


def test_shards_and_pytorch_bin(tmp_path):
    from huggingface_hub import save_torch_state_dict

    model = tiny_model("rwkv6", torch.float32)
    infctx.save_model(model, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "shards").mkdir()
    save_torch_state_dict(weights, tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(tmp_path / "shards", tmp_path / "hf")
    (tmp_path / "bin").mkdir()
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    assert same(tmp_path / "bin", tmp_path / "hf")
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        infctx.load_model(tmp_path / "shards")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("prefix", [*PREFIXES, "_forward_module.model."])
def test_prefixes_and_any_order(tmp_path, arch, prefix):
    model = tiny_model(arch, torch.float32)
    weights = list(model.state_dict().items())
    random.Random(1).shuffle(weights)
    torch.save({prefix + name: x for name, x in weights}, tmp_path / "other.pth")
    infctx.save_model(model, tmp_path / "own.pth")
    assert same(tmp_path / "own.pth", tmp_path / "other.pth")


def test_squeezed_tensors_get_their_published_shape(tmp_path):
    model = tiny_model("rwkv6", torch.float32)
    torch.save({name: x.squeeze() for name, x in model.state_dict().items()}, tmp_path / "flat.pth")
    infctx.save_model(model, tmp_path / "own.pth")
    assert same(tmp_path / "own.pth", tmp_path / "flat.pth")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_converted_when_asked(tmp_path, monkeypatch, capsys, dtype):
    infctx.save_model(tiny_model("rwkv5", torch.float32, spread=0.05), tmp_path / "a.pth")
    run(monkeypatch, "convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--dtype", dtype, "--verify")
    assert {x.dtype for x in read_model(tmp_path / "b.pth")[1].values()} == {getattr(torch, dtype)}
    difference = float(capsys.readouterr().out.split("largest difference ")[1].split()[0])
    assert (difference == 0) == (dtype == "float32") and difference < 0.1


def test_world_folder_has_its_tokenizer(tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "a.pth")
    run(monkeypatch, "init", path, "--n_layer", "1", "--n_embd", "64", "--vocab_size", "65536")
    run(monkeypatch, "convert", path, str(tmp_path / "hf"))
    assert "tokenizer: World" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "rwkv7"
    assert (tmp_path / "hf" / "tokenizer_config.json").is_file()


def test_what_is_there_is_not_mixed_or_overwritten(tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "a.pth")
    infctx.save_model(tiny_model("rwkv6", torch.float32), path)
    run(monkeypatch, "convert", path, str(tmp_path / "hf"))
    (tmp_path / "file").write_text("mine")
    for dst in ("hf", "file", "a.pth"):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, "convert", path, str(tmp_path / dst))
        assert end.value.code == 2 and re.search("name a|choose another name", capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    run(monkeypatch, "convert", path, str(tmp_path / "empty") + "/")
    assert same(path, tmp_path / "empty") and same(path, tmp_path / "hf")


def test_goldfinch_has_no_hugging_face_layout(tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face layout for goldfinch"):
        infctx.save_model(tiny_model("goldfinch", torch.float32), tmp_path / "hf")


@pytest.mark.parametrize("suffix", [".pth", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_loading_maps_the_file(tmp_path, suffix):
    """What is not converted takes no memory of its own: 256 MB of weights, and less than a tenth of that allocated."""
    config = infctx.ModelConfig("rwkv7", 1, 64, 500_000)
    infctx.save_model(infctx.init_model(config), tmp_path / f"m{suffix}")
    infctx.save_model(tiny_model(dtype=torch.float32), tmp_path / "small.pth")
    code = (
        "import re, sys, infctx, torch\n"
        "infctx.load_model(sys.argv[2])\n"  # imports what it needs
        "def private(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = private(); model = infctx.load_model(sys.argv[1]); print(private() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / x) for x in (f"m{suffix}", "small.pth"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 25


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_training_does_not_write_into_the_file(tmp_path, suffix):
    infctx.save_model(tiny_model(dtype=torch.float32), tmp_path / f"m{suffix}")
    before = (tmp_path / f"m{suffix}").read_bytes()
    with torch.no_grad():
        for p in infctx.load_model(tmp_path / f"m{suffix}").parameters():
            p += 1
    assert (tmp_path / f"m{suffix}").read_bytes() == before


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, arch, suffix, dtype):
    model = tiny_model(arch, dtype=dtype)
    path = tmp_path / "deep" / f"model{suffix}"
    infctx.save_model(model, path)
    again = infctx.load_model(path)
    assert again.config == model.config
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again.parameters(), model.parameters()))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert next(infctx.load_model(path, torch.float64).parameters()).dtype == torch.float64
    assert sorted(x.name for x in path.parent.iterdir()) == [path.name]


def test_saving_stops_without_a_trace(tmp_path, monkeypatch):
    model, path = tiny_model(dtype=torch.float32), tmp_path / "model.safetensors"
    path.write_text("old")

    def full(weights, file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infctx.weights.save_file", full)
    with pytest.raises(OSError):
        infctx.save_model(model, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_layer_zero_value_residual_may_be_missing(tmp_path):
    model = tiny_model(dtype=torch.float32)
    weights = {
        k: v
        for k, v in model.state_dict().items()
        if k[:15] not in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
    }
    torch.save(weights, tmp_path / "a.pth")
    again = infctx.load_model(tmp_path / "a.pth")
    tokens = torch.arange(20).view(1, -1)
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert again.state_dict().keys() == model.state_dict().keys()


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def bomb(path):
    torch.save({"emb.weight": Bomb()}, path)


def raw_pickle_bomb(path):
    path.write_bytes(pickle.dumps(Bomb()))


def half(path):
    torch.save(tiny_model(dtype=torch.float32).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def without(name):
    def write(path):
        weights = tiny_model(dtype=torch.float32).state_dict()
        del weights[name]
        torch.save(weights, path)

    return write


def misshapen(path):
    weights = tiny_model(dtype=torch.float32).state_dict()
    weights["blocks.1.att.key.weight"] = torch.zeros(3, 3)
    torch.save(weights, path)


def named(*names):
    return lambda path: torch.save({name: torch.zeros(4, 4) for name in ("emb.weight", *names)}, path)


def with_extra(name):
    return lambda path: torch.save({**tiny_model(dtype=torch.float32).state_dict(), name: torch.zeros(2)}, path)


def without_layer(path):
    weights = tiny_model(dtype=torch.float32, n_layer=3).state_dict()
    torch.save({name: x for name, x in weights.items() if not name.startswith("blocks.1.")}, path)


BAD = {
    "bomb.pth": (bomb, "would run code"),
    "raw.pth": (raw_pickle_bomb, "would run code"),
    "empty.pth": (lambda p: p.write_bytes(b""), "not a readable weight file"),
    "page.pth": (lambda p: p.write_text("<!doctype html><html>404</html>"), "would run code"),
    "page.safetensors": (lambda p: p.write_text("<!doctype html><html>404</html>"), "not a readable weight file"),
    "half.pth": (half, "not a readable weight file"),
    "zip.pth": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "not a readable weight file"),
    "list.pth": (lambda p: torch.save([torch.zeros(2)], p), "expected tensors by name"),
    "trainer.pth": (lambda p: torch.save({"epoch": 3, "emb.weight": torch.zeros(2)}, p), "expected tensors by name"),
    "other.safetensors": (lambda p: save_file({"transformer.wte.weight": torch.zeros(2)}, p), "no RWKV model"),
    "rwkv6.pth": (named("blocks.0.att.time_maa_x"), "not a whole rwkv6 model"),
    "rwkv6a.pth": (named("blocks.0.att.time_maa_x", "blocks.0.att.gate_w1"), "weights of RWKV-6a"),
    "rwkv6c.pth": (named("blocks.0.att.time_maa_x", "blocks.0.att.time_maa_rkvw_w1"), "weights of RWKV-6b or 6c"),
    "rwkv7b.pth": (named("blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight", "blocks.0.qkv.k_emb.weight"), "RWKV-7b"),
    "rwkv8.pth": (named("blocks.0.att.r_k", "blocks.0.ffn.enn.weight"), "RWKV-8"),
    "rosa.pth": (named("blocks.0.att.r_k", "blocks.0.rosa.q.weight"), "RWKV-8 (ROSA)"),
    "rwkv4a.pth": (named("blocks.0.att.time_decay", "blocks.0.att.time_mix_qq"), "RWKV-4a"),
    "adapter.pth": (with_extra("blocks.0.att.key.lora_A"), "does not know blocks.0.att.key.lora_A"),
    "gap.pth": (without_layer, "layers [1] are missing"),
    "no_head.pth": (without("head.weight"), "head.weight"),
    "no_key.pth": (without("blocks.0.ffn.key.weight"), "not a whole rwkv7 model"),
    "misshapen.pth": (misshapen, "blocks.1.att.key.weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weight_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ValueError) as error:
        infctx.load_model(name)
    assert message in str(error.value) and name in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
    assert not (tmp_path / "exploded").exists()


def test_missing_weight_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth: no such file"):
        infctx.load_model("nowhere.pth")


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"\.pth or \.safetensors"):
        infctx.save_model(tiny_model(), tmp_path / "model.gguf")
