"""`infctx plan` and `infctx check` as commands: what they say, and what they refuse in a line, as `fit` does."""

import re
from pathlib import Path

import pytest
import torch
from tiny import make_project, run

RECIPES = Path(__file__).parents[1] / "recipes" / "strategy"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    return tmp_path / "project"


def command(monkeypatch, capsys, *argv, code=0):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *argv)
    assert (end.value.code or 0) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_plan_command(project, monkeypatch, capsys):
    given = ("plan", "-c", "recipe.yaml", "--device", "h200")
    error = command(monkeypatch, capsys, *given, "--data.segments_per_window", "document", code=2)
    assert "run `infctx prepare`, or give --tokens N" in error
    text = command(monkeypatch, capsys, *given, "--tokens", "33", "--ranks", "1", "4", "--explain")
    assert "2 lanes x 3 segments x 16 tokens" in text and "border states: ceil(3 / 3) + 3 + 1 = 5 rows" in text
    assert re.search(r"^single +1 ", text, re.M) and re.search(r"^fsdp2 +4 ", text, re.M)
    assert not re.search(r"^ddp +2 ", text, re.M) and not (project / "prepared").exists()
    command(monkeypatch, capsys, "prepare", "-c", "recipe.yaml")
    text = command(monkeypatch, capsys, *given, "--ranks", "2", "--data.segments_per_window", "document")
    assert "2 lanes x 15 segments x 16 tokens" in text and "h/epoch" in text and not (project / "runs").exists()
    for options, message in {
        ("--device", "h2000"): "is not known; choose one of",
        ("--model.kernel", "cpu"): "model.kernel cpu does not run on h200",
        ("--ranks", "3", "--parallel.time", "2"): "no multiple of it",
        ("--trainer.precision", "16-mixed"): "choose bf16-mixed or 32-true",
        ("--model.horizon", "0"): "model.horizon must be at least 1",
        ("--model.init", "null"): "model: give load",
    }.items():
        assert message in command(monkeypatch, capsys, *given, *options, code=2)


NUMBERS = {
    ("--data.segments_per_window", "0"): "data.segments_per_window must be at least 1, got 0",
    ("--data.segments_per_window", "-3"): "data.segments_per_window must be at least 1, got -3",
    ("--trainer.accumulate_grad_batches", "0"): "trainer.accumulate_grad_batches must be at least 1 window, got 0",
    ("--trainer.accumulate_grad_batches", "-2"): "trainer.accumulate_grad_batches must be at least 1 window, got -2",
    ("--trainer.limit_train_batches", "0"): "trainer.limit_train_batches must be above 0",
    ("--trainer.max_epochs", "0"): "trainer.max_epochs 0",
    ("--trainer.accelerator", "foo"): "foo",
    ("--trainer.strategy", "nosuch"): "nosuch",
    ("--model.optimizer.lr", "-1"): "model.optimizer.lr must be above 0",
}


@pytest.mark.parametrize("options", NUMBERS, ids=" ".join)
def test_what_fit_refuses_plan_and_check_refuse(project, monkeypatch, capsys, options):
    command(monkeypatch, capsys, "prepare", "-c", "recipe.yaml")
    for verb in (("fit", "--name", "a"), ("plan", "--device", "h200"), ("check",)):
        error = command(monkeypatch, capsys, *verb, "-c", "recipe.yaml", *options, code=2)
        assert NUMBERS[options] in error and len(error.splitlines()) == 1, verb
    assert not list(project.glob("runs/*/checkpoints"))


def test_ranks_and_tokens_as_they_are_written(project, monkeypatch, capsys):
    given = ("plan", "-c", "recipe.yaml", "--device", "H200", "--model.init.n_layer", "1")
    for words in (("--ranks=2",), ("--ranks", "[2]"), ("--ranks", "2,", "4")):
        text = command(monkeypatch, capsys, *given, *words, "--explain", "true")
        assert re.search("^ddp +2 ", text, re.M) and "border states" in text
        assert bool(re.search("^ddp +4 ", text, re.M)) == ("4" in "".join(words))
    for words in (("--ranks",), ("--ranks", "-1"), ("--ranks", "two"), ("--ranks=0",), ("--ranks", "1.5")):
        error = command(monkeypatch, capsys, *given, *words, code=2)
        assert error == "infctx: error: --ranks takes whole numbers of at least 1: --ranks 1 2 4\n"
    for words in (("--tokens", "0"), ("--tokens", "-5")):
        assert "--tokens must be at least 1" in command(monkeypatch, capsys, *given, *words, code=2)
    assert "plan -c recipe.yaml" in command(monkeypatch, capsys, "plan", "--device", "h200", code=2)


def test_reasons_of_the_parser_are_not_cut_off(project, monkeypatch, capsys):
    Path("seven.yaml").write_text((RECIPES / "zero2.yaml").read_text().replace("stage: 2", "stage: 7"))
    error = command(monkeypatch, capsys, "plan", "-c", "recipe.yaml", "--tokens", "1e6", code=2)
    assert "tokens: expected int; got 1000000.0" in error
    error = command(monkeypatch, capsys, "fit", "-c", "recipe.yaml", "-c", "seven.yaml", code=2)
    assert "trainer.strategy.stage: expected 1, 2 or 3; got 7" in error


def test_strategies_that_cannot_share_a_document(project, monkeypatch, capsys):
    given = ("-c", "recipe.yaml", "--ranks", "2", "--parallel.time", "2")
    text = command(monkeypatch, capsys, "plan", *given, "--device", "h200", "--model.init.n_layer", "1")
    assert "left out: zero3, zero3-offload, fsdp2: " in text and not re.search("^(zero3|fsdp2)", text, re.M)
    for name in ("zero3", "fsdp2"):
        error = command(monkeypatch, capsys, "check", *given, "-c", str(RECIPES / f"{name}.yaml"), code=2)
        assert "choose parallel.schedule scan, or zero2" in error
    gold = ("--parallel.schedule", "scan", "--model.init.arch", "goldfinch")
    for verb in (("plan", "--device", "h200"), ("check",)):
        assert "GoldFinch's attention needs all keys" in command(monkeypatch, capsys, *verb, *given, *gold, code=2)


def test_check_command(project, monkeypatch, capsys):
    given = ("check", "-c", "recipe.yaml")
    assert "run `infctx prepare`\n" in command(monkeypatch, capsys, *given, code=2)
    command(monkeypatch, capsys, "prepare", "-c", "recipe.yaml")
    assert "as each of 1 rank\n" in command(monkeypatch, capsys, *given)
    for options in (("--ranks", "2"), ("--ranks", "4", "--parallel.time", "2"),
                    ("--ranks", "2", "--parallel.time", "2", "--parallel.schedule", "scan")):  # fmt: skip
        text = command(monkeypatch, capsys, *given, *options)
        assert f"forward and backward, as each of {options[1]} ranks" in text and "no fault found" in text
    for options, message in {
        ("--ranks", "3", "--parallel.time", "2"): "no multiple of it",
        ("--ranks", "2", "--trainer.devices", "4"): "set trainer.devices to 2",
        ("--model.init.vocab_size", "100"): "set model.init.vocab_size to 257",
        ("--ranks", "2", "--trainer.strategy", "deepspeed_stage_2"): "trainer.strategy deepspeed_stage_2",
        ("--trainer.max_epochs", "-1"): "set trainer.max_epochs or trainer.max_steps",
        ("--trainer.limit_train_batches", "0.01"): "leaves no window",
        ("--trainer.strategy", "zero2"): "trainer.strategy zero2 is not supported",
        ("--data.validation", "6"): "takes 6 of 6 documents",
    }.items():
        assert message in command(monkeypatch, capsys, *given, *options, code=2)
    assert not (project / "runs").exists() and not torch.distributed.is_initialized()
