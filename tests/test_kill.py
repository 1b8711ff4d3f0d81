"""Law 10, the hard way: a run killed at random moments and resumed ends with the weights of one never stopped."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import RECIPE, make_project


def start(project, name):
    command = [sys.executable, "-m", "infctx", "fit", "-c", "recipe.yaml", "--name", name, "--resume", "auto"]
    return subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(project, name):
    path = project / "runs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(x) for x in lines if x.endswith("}")]


def last_weights(project, name):
    folders = (project / "runs" / name / "checkpoints").glob("step-*")
    return load_file(max(folders, key=lambda x: int(x.name[5:])) / "model.safetensors")


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, kills):
    recipe = RECIPE.replace("every_n_steps: 2", "every_n_steps: 3").replace(
        "max_epochs: 2", f"max_epochs: {2 + 5 * kills}"
    )
    recipe = recipe.replace("keep: 100", "keep: 2")
    project = make_project(tmp_path / "project", recipe=recipe)
    whole = start(project, "whole")
    assert whole.wait(300) == 0, whole.stdout.read()
    total = rows(project, "whole")[-1]["step"]
    random.seed(time.time_ns())
    moments = sorted(random.sample(range(2, total - 2), kills))
    for moment in moments:
        run = start(project, "killed")
        deadline = time.monotonic() + 300
        while run.poll() is None and time.monotonic() < deadline:
            if (seen := rows(project, "killed")) and seen[-1]["step"] >= moment:
                time.sleep(random.uniform(0, 0.03))  # anywhere in a step: forward, update, saving
                break
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.stdout.read()
    run = start(project, "killed")
    assert run.wait(300) == 0, run.stdout.read()
    a, b = last_weights(project, "whole"), last_weights(project, "killed")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), f"killed at steps {moments}"
    losses = [[x["loss"] for x in rows(project, name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1], f"killed at steps {moments}"
