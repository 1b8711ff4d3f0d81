"""Fit as a user runs it: figures, gradients under accumulation, validation, and resuming at every step."""

import contextlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import RECIPE, make_project, run

import infctx
from infctx.bptt import window_loss


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    return tmp_path / "project"


def lines(project, name):
    return [json.loads(x) for x in (project / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def final(project, name):
    folders = (project / "runs" / name / "checkpoints").glob("step-*")
    last = max(folders, key=lambda x: int(x.name[5:]))
    return load_file(last / "model.safetensors"), last.name


def timeless(rows):
    return [
        {k: v for k, v in x.items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")} for x in rows
    ]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_and_what_it_leaves(project, monkeypatch, capsys):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    out = capsys.readouterr().out
    rows = lines(project, "a")
    assert [x["step"] for x in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["tokens"] == 2 * 583 and rows[-1]["documents"] == 2 * 6
    assert rows[-1]["loss"] < rows[0]["loss"] and 5 < rows[0]["loss"] < 6.5  # ln 257 = 5.55
    assert set(rows[0]) >= {
        "step", "tokens", "documents", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "seconds",
    }  # fmt: skip
    assert rows[0]["lr"] == pytest.approx(5e-3) and rows[1]["lr"] == pytest.approx(1e-2)
    folder = project / "runs" / "a"
    assert {x.name for x in folder.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "report.html",
        "tensorboard",
    }
    assert "6 documents, 583 tokens" in out and re.search(r"padding \d+\.\d+%", out) and "digest" in out
    run(monkeypatch, "fit", "-c", "runs/a/config.yaml", "--name", "b")
    assert timeless(lines(project, "b")) == timeless(rows)
    assert same(final(project, "a")[0], final(project, "b")[0])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.accumulate_grad_batches", "2"],
        ["--data.segments_per_window", "document", "--data.batch_size", "1"],
        pytest.param(["--trainer.precision", "bf16-mixed", "--model.horizon", "2"], marks=pytest.mark.slow),
        ["--model.init.arch", "rwkv4", "--trainer.max_epochs", "1"],
        ["--model.init.arch", "goldfinch", "--trainer.max_epochs", "1"],
    ],
    ids=["plain", "accumulate", "document", "bf16", "rwkv4", "goldfinch"],
)
def test_resumed_at_every_checkpoint_equals_never_stopped(project, monkeypatch, options):
    """Law 10: in the middle of a document, of an epoch, at its end."""
    command = ["fit", "-c", "recipe.yaml", "--checkpoint.every_n_steps", "1", *options]
    run(monkeypatch, *command, "--name", "whole")
    weights, last = final(project, "whole")
    rows = timeless(lines(project, "whole"))
    steps = len(rows)
    assert last == f"step-{steps}" and steps >= 3
    for stop in range(1, steps):
        name = f"from-{stop}"
        run(monkeypatch, *command, "--name", name, "--resume", f"runs/whole/checkpoints/step-{stop}")
        assert timeless(lines(project, name)) == rows[stop:], name
        assert same(final(project, name)[0], weights), name


def test_resume_twice_by_name(project, monkeypatch, capsys):
    """A run that was cut off goes on; one that has ended is left alone; one with a later end goes on again."""
    command = ["fit", "-c", "recipe.yaml", "--checkpoint.every_n_steps", "1"]
    run(monkeypatch, *command, "--name", "whole")
    rows = timeless(lines(project, "whole"))
    count = {"left": 0}
    original = window_loss

    def dying(*args, **options):
        count["left"] -= 1
        if count["left"] < 0:
            raise FloatingPointError("cut off")
        return original(*args, **options)

    monkeypatch.setattr("infctx.training.window_loss", dying)
    for left in (2, 3, 100):
        count["left"] = left
        try:
            run(monkeypatch, *command, "--name", "cut", "--resume", "auto")
        except SystemExit:
            assert left < 100
    assert timeless(lines(project, "cut")) == rows
    assert same(final(project, "cut")[0], final(project, "whole")[0])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *command, "--name", "cut", "--resume", "auto")
    assert not end.value.code and "has ended" in capsys.readouterr().out
    run(monkeypatch, *command, "--name", "cut", "--resume", "auto", "--trainer.max_epochs", "3")
    assert lines(project, "cut")[-1]["tokens"] == 3 * 583


@pytest.mark.parametrize("options", [[], ["--trainer.accumulate_grad_batches", "2"]], ids=["plain", "accumulate"])
def test_cut_off_after_every_step(project, monkeypatch, options):
    """What a resumed run writes is resumed again, at the ends of epochs too."""
    command = ["fit", "-c", "recipe.yaml", "--checkpoint.every_n_steps", "1", "--trainer.max_epochs", "3", *options]
    run(monkeypatch, *command, "--name", "whole")
    original = window_loss
    for _ in lines(project, "whole"):
        windows = iter(range(2 if options else 1))

        def dying(*args, left=windows, **given):
            if next(left, None) is None:
                raise FloatingPointError("cut off")
            return original(*args, **given)

        monkeypatch.setattr("infctx.training.window_loss", dying)
        with contextlib.suppress(SystemExit):
            run(monkeypatch, *command, "--name", "cut", "--resume", "auto")
    assert timeless(lines(project, "cut")) == timeless(lines(project, "whole"))
    assert same(final(project, "cut")[0], final(project, "whole")[0])


def test_update_does_not_depend_on_the_layout(project, monkeypatch):
    """Law 7 end to end: one step over all documents, as lanes or as accumulated windows, with a short last group."""
    results = []
    for lanes, windows in ((6, 1), (1, 100), (2, 100)):
        name = f"{lanes}x{windows}"
        options = {
            "trainer.max_epochs": 1, "data.batch_size": lanes, "data.segments_per_window": "document",
            "trainer.accumulate_grad_batches": windows, "model.l2_penalty": 1e-2,
        }  # fmt: skip
        flags = [f"--{key}={value}" for key, value in options.items()]
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", name, *flags)
        (row,) = lines(project, name)
        results.append((row["loss"], row["grad_norm"]))
    for loss, norm in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and norm == pytest.approx(results[0][1], rel=1e-4)


def printed_loss(capsys):
    return float(re.search(r"validation_loss: (\S+)", capsys.readouterr().out)[1])


def test_validation(project, monkeypatch, capsys):
    options = ["--data.validation", "2", "--trainer.val_check_interval", "1"]
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "v", *options)
    path = project / "runs" / "v" / "validation.jsonl"
    losses = [json.loads(x) for x in path.read_text().splitlines()]
    assert len(losses) == len(lines(project, "v")) and losses[-1]["loss"] < losses[0]["loss"]
    capsys.readouterr()
    run(monkeypatch, "validate", "-c", "recipe.yaml", *options[:2], "--model.load", "runs/v")
    assert printed_loss(capsys) == pytest.approx(losses[-1]["loss"], rel=1e-5)
    share = ["--data.validation", "0.4"]
    run(monkeypatch, "validate", "-c", "recipe.yaml", *share, "--model.load", "runs/v")
    assert printed_loss(capsys) == pytest.approx(losses[-1]["loss"], rel=1e-5)  # the same two of six


def test_validation_loss_is_that_of_the_documents(project, monkeypatch, capsys):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "v")
    (project / "held").mkdir()
    texts = ["what was read", "the state carries on and on"]
    for i, text in enumerate(texts):
        (project / "held" / f"{i}.txt").write_text(text)
    capsys.readouterr()
    source = '{"path": "held/*.txt", "format": "text"}'
    run(monkeypatch, "validate", "-c", "recipe.yaml", "--data.validation", source, "--model.load", "runs/v")
    printed = printed_loss(capsys)
    model, total, count = infctx.load_model("runs/v"), 0.0, 0
    for text in texts:
        ids = torch.tensor([[b + 1 for b in text.encode()] + [0]])
        logits, _ = model(ids[:, :-1])
        total += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert printed == pytest.approx(total / count, rel=1e-5)


def test_continued_from_weights(project, monkeypatch):
    """A later flag wins: load over the recipe's init."""
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    run(monkeypatch, "export", "runs/a", "out/a.pth")
    assert same(infctx.load_model("out/a.pth").state_dict(), final(project, "a")[0])  # law 11
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "b", "--model.load", "out/a.pth")
    assert lines(project, "b")[0]["loss"] < lines(project, "a")[-1]["loss"] + 0.2


def test_generate_after_training(project, monkeypatch, capsys):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        run(
            monkeypatch,
            "generate",
            "runs/a",
            "--prompt",
            "the state",
            "--max_tokens",
            "20",
            "--top_p",
            "0.9",
            "--seed",
            seed,
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("the state")


def test_non_finite_loss_names_the_documents(project, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--model.optimizer.lr", "1e30")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "the loss is nan in window" in error and "documents [" in error


def test_a_name_is_not_used_twice(project, monkeypatch, capsys):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--trainer.max_epochs", "1")
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    assert "runs/a holds a run already: give another --name, or --resume auto" in capsys.readouterr().err


def test_other_data_is_refused_on_resume(project, monkeypatch, capsys):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--trainer.max_steps", "2")
    for change, key in ((["--data.segment_length", "8"], "segment_length"), (["--data.batch_size", "1"], "lanes")):
        with pytest.raises(SystemExit):
            run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--resume", "auto", *change)
        assert f"data.{key} was" in capsys.readouterr().err
    (project / "texts" / "0.txt").write_text("other words")
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--resume", "auto")
    assert "data.digest was" in capsys.readouterr().err


def test_checkpoints_are_pruned(project, monkeypatch):
    options = ["--checkpoint.every_n_steps", "1", "--checkpoint.keep", "2"]
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", *options)
    steps = len(lines(project, "a"))
    names = {x.name for x in (project / "runs" / "a" / "checkpoints").iterdir()}
    assert names == {f"step-{steps}", f"step-{steps - 1}"}


def test_recipe_of_the_tests_has_the_stable_keys():
    assert all(key in RECIPE for key in ("model:", "data:", "checkpoint:", "seed_everything:", "trainer:"))


@pytest.mark.parametrize("options", [[], ["--trainer.accumulate_grad_batches", "2"]], ids=["plain", "accumulate"])
def test_stopped_in_mid_epoch_and_continued(project, monkeypatch, options):
    """max_steps ends a run, not its epoch: nothing of it is left out when the run goes on."""
    command = ["fit", "-c", "recipe.yaml", "--model.optimizer.schedule", "constant", *options]
    run(monkeypatch, *command, "--name", "whole")
    run(monkeypatch, *command, "--name", "cut", "--trainer.max_steps", "3")
    run(monkeypatch, *command, "--name", "cut", "--resume", "auto")
    assert timeless(lines(project, "cut")) == timeless(lines(project, "whole"))
    assert same(final(project, "cut")[0], final(project, "whole")[0])


def test_the_recipe_rules_the_rates_of_a_resumed_run(project, monkeypatch):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--trainer.max_steps", "3")
    change = ["--model.optimizer.lr", "1e-5", "--model.optimizer.schedule", "constant"]
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--resume", "auto", *change)
    assert [x["lr"] for x in lines(project, "a")][3:] == [1e-5] * (len(lines(project, "a")) - 3)


def test_resumed_from_an_earlier_step(project, monkeypatch, capsys):
    """What the run left behind beyond that step is another history: it goes, and says so."""
    command = ["fit", "-c", "recipe.yaml", "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "3"]
    run(monkeypatch, *command, "--name", "a")
    steps = len(lines(project, "a"))
    capsys.readouterr()
    path = f"runs/a/checkpoints/step-{steps - 2}"
    run(monkeypatch, *command, "--resume", path, "--trainer.max_steps", str(steps - 1))
    assert final(project, "a")[1] == f"step-{steps - 1}" and len(lines(project, "a")) == steps - 1
    assert f"step-{steps}" in capsys.readouterr().out


def test_limited_epochs_count_what_they_read(project, monkeypatch):
    """The last step of a limited epoch is divided by the tokens it has, not by those it would have had."""
    options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches"]
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", *options, "1")
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "b", *options, "1", "--trainer.accumulate_grad_batches", "2")
    assert timeless(lines(project, "a")) == timeless(lines(project, "b"))


def test_non_finite_gradient_makes_no_update(project, monkeypatch, capsys):
    monkeypatch.setattr("infctx.training.total_norm", lambda model: float("inf"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    assert "the gradient's norm is inf at step 1: no update was made" in capsys.readouterr().err
    assert not list((project / "runs" / "a").glob("checkpoints/step-*"))


def test_a_run_left_in_the_middle_of_a_line(project, monkeypatch):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    file = project / "runs" / "a" / "metrics.jsonl"
    rows = lines(project, "a")
    file.write_text(file.read_text()[:-20])
    (project / "runs" / "a" / "ended.json").write_text("")
    run(monkeypatch, "report", "runs/a")
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--resume", "auto", "--trainer.max_epochs", "3")
    assert timeless(lines(project, "a"))[: len(rows) - 1] == timeless(rows)[:-1]


def test_resumed_where_it_ends(project, monkeypatch, capsys):
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "whole")
    _, last = final(project, "whole")
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "more", "--resume", f"runs/whole/checkpoints/{last}")
    assert f"{last} is where the run ends; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--data.validation", "1"]], ids=["plain", "validation"])
def test_an_ended_run_goes_on_to_a_later_step(project, monkeypatch, options):
    """Its only checkpoint is that of its end; max_steps and max_epochs are both raised."""
    command = ["fit", "-c", "recipe.yaml", "--model.optimizer.schedule", "constant", *options]
    later = ["--trainer.max_epochs", "3"]
    run(monkeypatch, *command, "--name", "whole", *later)
    run(monkeypatch, *command, "--name", "cut", "--checkpoint.every_n_steps", "100")
    ended = len(lines(project, "cut"))
    later += ["--trainer.max_steps", str(ended + 2), "--checkpoint.every_n_steps", "100"]
    run(monkeypatch, *command, "--name", "cut", "--resume", "auto", *later)
    assert json.loads((project / "runs" / "cut" / "ended.json").read_text()) == [ended + 2, 3, ended + 2]
    run(monkeypatch, *command, "--name", "cut", "--resume", "auto", *later[:2])
    assert timeless(lines(project, "cut")) == timeless(lines(project, "whole"))
    assert same(final(project, "cut")[0], final(project, "whole")[0])
    if options:
        held = [(project / "runs" / x / "validation.jsonl").read_text() for x in ("whole", "cut")]
        assert held[0] == held[1]


def test_a_run_that_ends_early_has_not_ended(project, monkeypatch):
    """By a callback or a limit of time, say."""
    monkeypatch.setattr("infctx.data.DocumentData.total_steps", lambda data: 100)
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a")
    assert not (project / "runs" / "a" / "ended.json").exists()
