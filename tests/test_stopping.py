"""Control-C stops a run after a whole optimizer step, and loses nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_project, run
from tqdm import tqdm

from infctx.bptt import window_loss
from infctx.changes import changed


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may have it ignored
    yield tmp_path / "project"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def text(project, name, file="metrics.jsonl"):
    return (project / "runs" / name / file).read_text()


def losses(project, name):
    return [(x["step"], x["tokens"], x["loss"], x["lr"]) for x in map(json.loads, text(project, name).splitlines())]


def last(project, name):
    return max((project / "runs" / name / "checkpoints").glob("step-*"), key=lambda x: int(x.name[5:]))


def interrupted(monkeypatch, at, times=1):
    """SIGINT comes in the middle of window `at`, from 0."""
    count = iter(range(at))

    def interrupting(*args, **options):
        if next(count, None) is None:
            monkeypatch.setattr("infctx.training.window_loss", window_loss)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return window_loss(*args, **options)

    monkeypatch.setattr("infctx.training.window_loss", interrupting)


@pytest.mark.parametrize(
    "options",
    [
        ["--data.validation", "1", "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "3"],
        ["--trainer.accumulate_grad_batches", "2", "--trainer.min_epochs", "1"],
    ],
    ids=["validation", "accumulate"],
)
def test_stopped_equals_never_stopped(project, monkeypatch, capfd, options):
    """In the middle of an epoch, at its end, and within the windows of one step."""
    command = ["fit", "-c", "recipe.yaml", "--checkpoint.every_n_steps", "100", *options]
    run(monkeypatch, *command, "--name", "whole")
    windows, stops, end = (2 if "2" in options else 1), [], None
    capfd.readouterr()
    while end is None or end.value.code == 130:
        interrupted(monkeypatch, 2 * windows)
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, *command, "--name", "cut", "--resume", "auto")
            raise SystemExit(0)
        told = capfd.readouterr()
        if end.value.code:
            stops.append(int(last(project, "cut").name[5:]))
            assert f"run: stopped at step {stops[-1]}, saved; --resume auto goes on" in told.out
            assert told.err.count("stopping after this step; once more: at once") == 1
    assert stops == [*range(3, len(losses(project, "whole")), 3)] and len(stops) > 1
    assert losses(project, "cut") == losses(project, "whole")
    a, b = (load_file(last(project, name) / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if "--data.validation" in options:
        assert text(project, "cut", "validation.jsonl") == text(project, "whole", "validation.jsonl")


def test_twice_stops_at_once(project, monkeypatch):
    interrupted(monkeypatch, 2, times=2)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--checkpoint.every_n_steps", "100")
    assert end.value.code == 1 and not list((project / "runs").glob("a/checkpoints/step-*"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step(project):
    """One of them hears of it, as with a launcher that hands it to the first alone."""
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1", "--trainer.max_epochs"]
    command = [sys.executable, "-m", "infctx", "fit", "-c", "recipe.yaml", "--name", "a", *options, "200"]
    with (project / "log").open("w") as log:
        ranks = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        file, deadline = project / "runs" / "a" / "metrics.jsonl", time.monotonic() + 120
        while ranks.poll() is None and time.monotonic() < deadline and not (file.exists() and file.read_text()):
            time.sleep(0.02)
        ranks.send_signal(signal.SIGINT)
        try:
            code = ranks.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
    told = (project / "log").read_text()
    assert code == 130 and "error" not in told, told
    step = losses(project, "a")[-1][0]
    assert last(project, "a").name == f"step-{step}" and f"run: stopped at step {step}, saved" in told


def test_begins_anew_aloud(project, monkeypatch, capsys):
    """Stopped before its first checkpoint."""
    command = ["fit", "-c", "recipe.yaml", "--name", "a", "--checkpoint.every_n_steps", "100", "--resume", "auto"]
    interrupted(monkeypatch, 2, times=2)
    with pytest.raises(SystemExit):
        run(monkeypatch, *command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert len(losses(project, "a")) == 2 and "anew" not in capsys.readouterr().out
    run(monkeypatch, *command)
    assert "run: runs/a has no checkpoint yet: begins anew\n" in capsys.readouterr().out
    assert [x[0] for x in losses(project, "a")] == list(range(1, 15))


def test_a_resumed_run_tells_what_has_changed(project, monkeypatch, capsys):
    command = ["fit", "-c", "recipe.yaml", "--name", "a", "--trainer.max_epochs", "1"]
    run(monkeypatch, *command)
    run(monkeypatch, *command[:-1], "2", "--resume", "auto", "--model.optimizer.lr", "1e-3")
    told = [x for x in capsys.readouterr().out.splitlines() if "changed since" in x]
    assert told == ["changed since: model.optimizer.lr 0.01 -> 0.001, trainer.max_epochs 1 -> 2"]
    with pytest.raises(SystemExit):  # refused: it changes nothing
        run(monkeypatch, *command[:-1], "3", "--resume", "auto", "--data.segment_length", "8")
    capsys.readouterr()
    run(monkeypatch, *command[:-1], "3", "--resume", "auto", "--model.optimizer.lr", "1e-3")
    assert "changed since: trainer.max_epochs 2 -> 3\n" in capsys.readouterr().out


def test_changes_of_whole_sections():
    old = {"model": {"load": "a.pth", "init": None}, "data": {"source": [{"path": "a"}]}, "name": "x"}
    new = {"model": {"load": None, "init": {"arch": "rwkv7"}}, "data": {"source": [{"path": "b"}]}, "parallel": None}
    assert changed(old, new) == [
        "model.load a.pth -> null", "model.init null -> {arch: rwkv7}", "data.source [{path: a}] -> [{path: b}]",
    ]  # fmt: skip
    assert changed(old, old) == []


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_a_run_within_its_warmup_says_so(project, monkeypatch, capsys, unit):
    more = ["--model.optimizer.unit", "tokens", "--model.optimizer.warmup_steps", "0"] if unit == "tokens" else []
    for warmup, told in ((2000, True), (3, False)):
        given = [*more, f"--model.optimizer.warmup_{unit}", str(warmup), "--trainer.max_steps", "4"]
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", f"{warmup}", *given)
        warnings = [x for x in capsys.readouterr().out.splitlines() if "warning" in x]
        assert bool(warnings) == told and all(f"model.optimizer.warmup_{unit} 2,000" in x for x in warnings)


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps", "9"],
        ["--trainer.max_steps", "4", "--trainer.accumulate_grad_batches", "2"],
        ["--data.segments_per_window", "document", "--trainer.max_steps", "3", "--trainer.max_epochs", "4"],
        ["--trainer.limit_train_batches", "3", "--trainer.max_epochs", "3"],
        ["--trainer.max_epochs", "3"],
    ],
    ids=["steps", "accumulate", "document", "limit", "epochs"],
)
def test_the_bar_ends_where_the_run_does(project, monkeypatch, options):
    """What a checkpoint brings is no work of this process."""
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **given):
            super().__init__(*args, **given)
            bars.append(self)

    monkeypatch.setattr("infctx.run.tqdm", Bar)
    command = ["fit", "-c", "recipe.yaml", "--trainer.enable_progress_bar", "true", "--checkpoint.every_n_steps", "1"]
    run(monkeypatch, *command, "--name", "a", *options)
    (bar,), rows = bars, [json.loads(x) for x in text(project, "a").splitlines()]
    done = rows[-1]
    assert bar.initial == 0 and bar.n == bar.total == done["tokens"]
    assert f"documents={done['documents']}/{done['documents']}" in bar.postfix
    run(monkeypatch, *command, "--name", "b", *options, "--resume", "runs/a/checkpoints/step-2")
    assert bars[1].initial == rows[1]["tokens"] and bars[1].n == bars[1].total == done["tokens"]
