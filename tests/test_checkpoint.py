"""Training checkpoints come back as they were, whole or not at all."""

import json

import pytest
import torch
from tiny import tiny_model

import infctx
from infctx.checkpoint import load_checkpoint, newest, save_checkpoint, verify


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
