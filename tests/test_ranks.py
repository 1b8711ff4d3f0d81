"""Law 7 over ranks: two processes of one lane make the steps that one process of two lanes makes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import RECIPE, make_project

SCRIPT = ["-m", "infctx", "fit", "-c", "recipe.yaml", "--checkpoint.every_n_steps", "1"]


def fit(project, name, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *SCRIPT, "--name", name, *options]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(x) for x in (project / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def weights(project, name):
    folders = (project / "runs" / name / "checkpoints").glob("step-*")
    return load_file(max(folders, key=lambda x: int(x.name[5:])) / "model.safetensors")


@pytest.mark.parametrize("arch", ["rwkv7", pytest.param("goldfinch", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, arch):
    recipe = RECIPE.replace("arch: rwkv7", f"arch: {arch}")
    project = make_project(tmp_path / "project", recipe=recipe)
    one = fit(project, "one", "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "3")
    ranks = ("--data.batch_size", "1", "--trainer.accumulate_grad_batches", "3", "--trainer.devices", "2",
             "--trainer.strategy", "ddp")  # fmt: skip
    two = fit(project, "two", *ranks)
    assert [(x["step"], x["tokens"], x["documents"]) for x in one] == [
        (x["step"], x["tokens"], x["documents"]) for x in two
    ]
    for a, b in zip(one, two):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )
    a, b = weights(project, "one"), weights(project, "two")
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)
    # The lanes of both ranks are in the checkpoint: one rank goes on where two were, or two again.
    first = len(one) - 2
    resume = ("--resume", f"runs/two/checkpoints/step-{first}")
    alone = fit(project, "alone", "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "3", *resume)
    again = [fit(project, "again", *ranks, *resume)] if arch == "goldfinch" else []
    for last in (alone, *again):
        assert [x["step"] for x in last] == [x["step"] for x in one][first:]
        for x, y in zip(last, one[first:]):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["wavefront", "scan"])
def test_ranks_that_share_a_document(tmp_path, schedule):
    project = make_project(tmp_path / "project")
    over_time = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--parallel.time", "2")
    one = fit(project, "one", "--data.validation", "1")
    two = fit(project, "two", "--data.validation", "1", *over_time, "--parallel.schedule", schedule)
    first = len(one) - 2
    resume = ("--data.validation", "1", "--resume", f"runs/two/checkpoints/step-{first}")
    for ours, theirs in ((two, one), (fit(project, "alone", *resume), one[first:])):
        for key in ("step", "tokens", "documents"):
            assert [x[key] for x in ours] == [x[key] for x in theirs]
        assert [x["loss"] for x in ours] == pytest.approx([x["loss"] for x in theirs], rel=1e-4)
        assert [x["grad_norm"] for x in ours] == pytest.approx([x["grad_norm"] for x in theirs], rel=1e-3)
    held = [(project / "runs" / name / "validation.jsonl").read_text() for name in ("one", "two")]
    a, b = (json.loads(x.splitlines()[0])["loss"] for x in held)
    assert b == pytest.approx(a, rel=1e-4)
