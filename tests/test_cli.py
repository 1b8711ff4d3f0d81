"""Errors that a user can cause: a few lines that name the place, no traceback, nothing half-written."""

import subprocess
import sys

import pytest
import torch
from tiny import RECIPE, make_project, run

FIT = ("fit", "-c", "recipe.yaml", "--name", "a")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    return tmp_path / "project"


def failing(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *argv)
    error = capsys.readouterr().err
    assert end.value.code not in (0, None)
    assert 1 <= len(error.strip().splitlines()) <= 5, error
    assert "Traceback" not in error and error.startswith("infctx: error: ")
    return error


OPTIONS = {
    "unknown key": (["--model.horizn", "2"], "horizn"),
    "unknown group": (["--modle.horizon", "2"], "modle"),
    "wrong type": (["--data.batch_size", "many"], "batch_size"),
    "segment_length 0": (["--data.segment_length", "0"], "data.segment_length must be at least 1, got 0"),
    "segments_per_window 0": (["--data.segments_per_window", "0"], "data.segments_per_window must be at least 1"),
    "segments_per_window word": (["--data.segments_per_window", "documents"], "segments_per_window"),
    "horizon 0": (["--model.horizon", "0"], "model.horizon must be at least 1"),
    "kernel": (["--model.kernel", "fast"], "choose one of: auto, reference, chunked"),
    "tuning": (["--model.tuning", "{method: lore}"], "model.tuning"),
    "tokenizer": (["--data.tokenizer", "words"], "tokenizer 'words' is not known"),
    "format": (["--data.source.format", "xml"], "choose one of: text, jsonl"),
    "missing file": (["--data.source.path", "nowhere/*.txt"], "'nowhere/*.txt': no such file"),
    "missing weights": (["--model.load", "nowhere.pth"], "nowhere.pth: no such file"),
    "neither load nor init": (["--model.init", "null"], "give load (weights to start from) or init"),
    "architecture": (["--model.init.arch", "rwkv99"], "rwkv99"),
    "head size": (["--model.init.head_size", "13"], "multiple of head_size 13"),
    "vocabulary": (["--model.init.vocab_size", "100"], "data.tokenizer has 257 ids, the model's vocab_size is 100"),
    "rate": (["--model.optimizer.lr", "-1"], "model.optimizer.lr must be above 0"),
    "schedule": (["--model.optimizer.schedule", "rising"], "schedule"),
    "checkpoint": (["--checkpoint.every_n_steps", "0"], "checkpoint.every_n_steps must be at least 1"),
    "precision": (["--trainer.precision", "16-mixed"], "choose bf16-mixed or 32-true"),
    "weights": (["--trainer.precision", "bf16-true"], "choose bf16-mixed or 32-true"),
    "validation": (["--data.validation", "6"], "takes 6 of 6 documents"),
    "no end": (["--trainer.max_epochs", "-1"], "the run has no end"),
    "resume from nothing": (["--resume", "nowhere"], "nowhere"),
    "missing recipe": (["-c", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(project, monkeypatch, capsys, name):
    options, message = OPTIONS[name]
    assert message in failing(monkeypatch, capsys, *FIT, *options)
    assert not list(project.glob("runs/*/checkpoints"))


RECIPES = {
    "unknown key": (RECIPE.replace("  tokenizer:", "  tokeniser:"), "tokeniser"),
    "not YAML": ("model: [", "recipe.yaml"),
    "tab": (RECIPE.replace("  path: prepared", "\tpath: prepared"), "recipe.yaml"),
    "not a mapping": ("- a\n- b\n", "recipe.yaml"),
    "code": ("model: !!python/object/apply:os.mkdir [exploded]\n", "recipe.yaml"),
    "no data": ("model: {init: {arch: rwkv7, n_layer: 1, n_embd: 16, vocab_size: 257}}\n", "data"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipes(project, monkeypatch, capsys, name):
    text, message = RECIPES[name]
    (project / "recipe.yaml").write_text(text)
    assert message in failing(monkeypatch, capsys, *FIT)
    assert not (project / "exploded").exists() and not (project / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"good\xff\xfebad"])
def test_bad_texts(project, monkeypatch, capsys, content):
    for file in (project / "texts").iterdir():
        file.write_bytes(content)
    assert "texts/" in failing(monkeypatch, capsys, *FIT)
    assert not list(project.glob("prepared/*.arrow")) and not list(project.glob("runs/*/checkpoints"))


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_bad_weights(project, monkeypatch, capsys):
    torch.save({"emb.weight": Bomb()}, "bomb.pth")
    torch.save({"blocks.0.rosa.q.weight": torch.zeros(4, 4)}, "rosa.pth")
    for name, message in {"bomb.pth": "would run code", "rosa.pth": "weights of RWKV-8 (ROSA)"}.items():
        assert message in failing(monkeypatch, capsys, *FIT, "--model.load", name)
        assert message in failing(monkeypatch, capsys, "generate", name, "--prompt", "a")
    assert not (project / "exploded").exists() and not (project / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fti"], "there is no command 'fti'"),
        (["export", "nowhere", "a.pth"], "nowhere"),
        (["export", "nowhere"], "out"),
        (["report", "nowhere"], "no run there"),
        (["generate", "nowhere.pth", "--prompt", "a"], "nowhere.pth: no such file"),
        (["validate", "-c", "recipe.yaml"], "data.validation is null"),
    ],
)
def test_bad_commands(project, monkeypatch, capsys, argv, message):
    assert message in failing(monkeypatch, capsys, *argv)


def test_export_to_an_unknown_suffix(project, monkeypatch, capsys):
    run(monkeypatch, *FIT, "--trainer.max_steps", "1")
    assert ".pth or .safetensors" in failing(monkeypatch, capsys, "export", "runs/a", "a.gguf")
    assert "prompt must hold" in failing(monkeypatch, capsys, "generate", "runs/a")


def test_prepare_alone(project, monkeypatch, capsys):
    run_prepare = ("prepare", "-c", "recipe.yaml", "--data.path", "elsewhere")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *run_prepare)
    assert not end.value.code and "prepared elsewhere" in capsys.readouterr().out
    assert (project / "elsewhere" / "prepared.json").exists() and not (project / "runs").exists()


def test_the_three_ways_to_start(project):
    root = make_project.__globals__["Path"](__file__).parents[1]
    for command in (["-m", "infctx"], [str(root / "trainer.py")]):
        done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=True)
        assert all(x in done.stdout for x in ("fit", "validate", "prepare", "export", "generate", "report"))


def test_debug_shows_where(project, monkeypatch):
    with pytest.raises(ValueError, match="segment_length"):
        run(monkeypatch, *FIT, "--data.segment_length", "0", "--debug")


def test_help_says_what_the_keys_mean(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "--help")
    text = capsys.readouterr().out
    for words in ("segments the gradient reaches back", "lanes on each device", "optimizer steps between"):
        assert words in text
