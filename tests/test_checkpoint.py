"""Weights come back as they were, files are whole or absent, and no file runs code."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

import infctx
from infctx.checkpoint import load_checkpoint, newest, save_checkpoint, verify


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, suffix, dtype):
    model = tiny_model(dtype=dtype, n_layer=1)
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

    monkeypatch.setattr("infctx.checkpoint.save_file", full)
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
    "rwkv6.pth": (lambda p: torch.save({"blocks.0.att.time_maa_x": torch.zeros(1, 1, 4)}, p), "weights of RWKV-6"),
    "rwkv4.pth": (lambda p: torch.save({"blocks.0.att.time_decay": torch.zeros(4)}, p), "weights of RWKV-4"),
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


def make_run(run, steps=(1, 5, 12)):
    weights = tiny_model(dtype=torch.float32).state_dict()
    for step in steps:
        save_checkpoint(run / "checkpoints" / f"step-{step}", weights, {"n": step}, {"step": step})


def test_training_checkpoint(tmp_path):
    make_run(tmp_path)
    make_run(tmp_path)  # again, over the old ones
    folder = newest(tmp_path)
    assert folder.name == "step-12" and verify(folder)["step"] == 12
    weights, training = load_checkpoint(folder)
    assert training == {"n": 12} and torch.equal(weights["emb.weight"], tiny_model(dtype=torch.float32).emb.weight)
    assert sorted(x.name for x in folder.parent.iterdir()) == ["step-1", "step-12", "step-5"]
    assert infctx.load_model(tmp_path).config == infctx.load_model(folder).config


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "empty"])
def test_damage_is_found_and_passed_over(tmp_path, capsys, file, damage):
    make_run(tmp_path)
    path = tmp_path / "checkpoints" / "step-12" / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        if damage == "flip":
            content[len(content) // 2] ^= 1 if file != "manifest.json" else 255
        path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_checkpoint(path.parent)
    assert str(path.parent) in str(error.value)
    assert newest(tmp_path).name == "step-5"
    assert "step-12" in capsys.readouterr().out


def test_interrupted_writes_are_no_checkpoints(tmp_path):
    make_run(tmp_path, (3,))
    (tmp_path / "checkpoints" / ".step-9.abc").mkdir()
    assert newest(tmp_path).name == "step-3"
    with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
        newest(tmp_path / "other")


def test_manifest_is_plain(tmp_path):
    make_run(tmp_path, (3,))
    manifest = json.loads((tmp_path / "checkpoints" / "step-3" / "manifest.json").read_text())
    assert set(manifest) == {"step", "files"} and set(manifest["files"]) == {"model.safetensors", "training.pt"}
