"""Groups, rates and their schedule."""

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import RECIPE, make_project, run, tiny_model

from infctx.checkpoint import load_checkpoint, newest
from infctx.data import DocumentData
from infctx.optim import OptimizerConfig, learning_rate_factor, make_optimizer, make_schedule, parameter_groups
from infctx.parallel.config import ParallelConfig
from infctx.sources import Source


def test_groups():
    model = tiny_model()
    groups = {g["name"]: g for g in parameter_groups(model, OptimizerConfig(lr=1.0, weight_decay=0.1))}
    names = {id(p): name for name, p in model.named_parameters()}
    members = {key: sorted(names[id(p)] for p in g["params"]) for key, g in groups.items()}
    assert members["double"] == ["blocks.0.att.w0", "blocks.1.att.w0"]
    assert {x.split(".", 2)[-1] for x in members["matrices"] if "blocks" in x} == {
        "att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight", "ffn.key.weight",
        "ffn.value.weight",
    }  # fmt: skip
    assert {"emb.weight", "head.weight"} < set(members["matrices"])
    rates = {key: (g["lr"], g["weight_decay"]) for key, g in groups.items()}
    assert rates == {"matrices": (1.0, 0.1), "rest": (1.0, 0.0), "double": (2.0, 0.0)}
    together = [name for group in members.values() for name in group]
    frozen = {f"blocks.0.att.v{i}" for i in range(3)}
    assert sorted(together) == sorted(set(names.values()) - frozen)


def test_warm_up_and_cosine():
    factor = learning_rate_factor(OptimizerConfig(lr=1e-3, warmup_steps=4, final_lr=1e-4), range(25))
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0 and factor(14) == pytest.approx(0.55) and factor(24) == factor(1000) == pytest.approx(0.1)


def test_constant_after_warm_up():
    factor = learning_rate_factor(OptimizerConfig(schedule="constant", warmup_steps=2), range(11))
    assert [factor(i) for i in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]


def test_all_groups_follow_the_schedule():
    config = OptimizerConfig(lr=1e-3, warmup_steps=2)
    optimizer = make_optimizer(tiny_model(), config)
    schedule = make_schedule(optimizer, config, range(11))
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-4, 1e-3]
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3, 2e-3]


def test_decay_moves_matrices_only():
    model = tiny_model(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if n.endswith(".weight") and before[n].dim() == 2}


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"warmup_steps": -1}])
def test_bad_numbers(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)


def test_linear_and_wsd():
    config = {"lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 4}
    linear = learning_rate_factor(OptimizerConfig(**config, schedule="linear"), range(25))
    assert [linear(i) for i in (3, 4, 14, 24, 99)] == pytest.approx([1, 1, 0.55, 0.1, 0.1])
    wsd = learning_rate_factor(OptimizerConfig(**config, schedule="wsd", decay_share=0.5), range(25))
    assert [wsd(i) for i in (3, 4, 14, 19, 24, 99)] == pytest.approx([1, 1, 1, 0.55, 0.1, 0.1])


def test_by_tokens():
    """Warm-up over 100 tokens, then to the floor over the 400 that are left: steps of 60, 80, 240, 20 and 100."""
    numbers = {"lr": 1e-3, "final_lr": 1e-4, "unit": "tokens", "warmup_tokens": 100}
    course = [0, 60, 140, 380, 400, 500]
    linear = learning_rate_factor(OptimizerConfig(**numbers, schedule="linear"), course)
    assert [linear(i) for i in range(5)] == pytest.approx([0.6, 1.0, 0.91, 0.37, 0.325])
    assert linear(5) == linear(99) == pytest.approx(0.1)
    wsd = learning_rate_factor(OptimizerConfig(**numbers, schedule="wsd", decay_share=0.5), course)
    assert [wsd(i) for i in range(6)] == pytest.approx([0.6, 1.0, 1.0, 0.1 + 0.9 * 0.6, 0.1 + 0.9 * 0.5, 0.1])
    bare = learning_rate_factor(OptimizerConfig(lr=1.0, unit="tokens", final_lr=0.0), course)
    assert [bare(i) for i in (0, 2, 5)] == pytest.approx([1, 0.5 + 0.5 * math.cos(math.pi * 0.28), 0])


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"unit": "tokens", "warmup_tokens": 9, "warmup_steps": 3}, "both given"),
        ({"warmup_tokens": 9}, "set model.optimizer.unit to tokens, or give warmup_steps"),
        ({"unit": "tokens", "warmup_steps": 3}, "unit is tokens: give warmup_tokens"),
        ({"unit": "tokens", "warmup_tokens": -1}, "warmup_tokens must be at least 0"),
    ],
)
def test_warm_up_is_in_the_unit_of_the_schedule(bad, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**bad)


BY_TOKENS = RECIPE.replace("warmup_steps: 2", "schedule: linear, unit: tokens, warmup_tokens: 300, final_lr: 0.0")
BY_TOKENS = BY_TOKENS.replace("segments_per_window: 3", "segments_per_window: document")


def test_a_run_by_tokens(tmp_path, monkeypatch):
    """Documents of uneven length: each step's rate is that of the tokens counted before it, also after a resume."""
    recipe = BY_TOKENS.replace("format: text}", "format: text, weight: 1.5}")
    monkeypatch.chdir(make_project(tmp_path / "project", (100, 37, 230, 61, 5, 150, 90, 20), recipe))
    options = ("--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "4")
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "whole", *options)
    lines = [json.loads(x) for x in Path("runs/whole/metrics.jsonl").read_text().splitlines()]
    read = [0, *(x["tokens"] for x in lines)]
    assert len({b - a for a, b in zip(read, read[1:])}) > 3, "the steps should differ in their tokens"
    for line, before, behind in zip(lines, read, read[1:]):
        factor = behind / 300 if before < 300 else 1 - (before - 300) / (read[-1] - 300)
        assert line["lr"] == pytest.approx(1e-2 * min(1.0, factor), rel=1e-12)
    last = newest("runs/whole").name
    for step in (2, 4):
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", f"from-{step}", *options,
            "--resume", f"runs/whole/checkpoints/step-{step}")  # fmt: skip
        (weights, training), (expected, trained) = (
            load_checkpoint(f"runs/{x}/checkpoints/{last}") for x in (f"from-{step}", "whole")
        )
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
        assert training["lr_schedulers"] == trained["lr_schedulers"]
        again = [json.loads(x)["lr"] for x in Path(f"runs/from-{step}/metrics.jsonl").read_text().splitlines()]
        assert again == [x["lr"] for x in lines[step:]]


@pytest.mark.parametrize("segments", [2, "document"])
def test_ranks_are_on_one_course(tmp_path, segments):
    project = make_project(tmp_path / "project")
    courses = []
    for ranks, time in ((1, 1), (2, 1), (4, 2)):
        data = DocumentData(Source(f"{project}/texts"), f"{project}/data", "bytes", 16, segments, 4 * time // ranks,
                            parallel=ParallelConfig(time=time))  # fmt: skip
        data.prepare_data()
        data.setup("fit")
        for rank in range(ranks):
            data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, max_epochs=-1, max_steps=7,
                                           accumulate_grad_batches=2, limit_train_batches=3)  # fmt: skip
            courses.append(data.course("tokens"))
    assert len(courses[0]) == 8 and all(course == courses[0] for course in courses)
    assert data.course("steps") == range(8)


def steps(optimizer, model, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_muon_and_adamw_together_are_each_of_them():
    config, models = (
        OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1),
        [tiny_model(dtype=torch.float32) for _ in range(2)],
    )
    together = make_optimizer(models[0], config)
    inside = {f"blocks.{i}.{x}.weight" for i in range(2)
              for x in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")}  # fmt: skip
    names = {id(p): name for name, p in models[0].named_parameters()}
    by_muon = [g for g in together.param_groups if g["name"].endswith("by muon")]
    assert {names[id(p)] for g in by_muon for p in g["params"]} == inside
    other = dict(models[1].named_parameters())
    muon = torch.optim.Muon(
        [other[x] for x in sorted(inside)], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    rest = [g | {"params": [p for p in g["params"] if not any(p is other[x] for x in inside)]}
            for g in parameter_groups(models[1], OptimizerConfig(lr=0.02, weight_decay=0.1))]  # fmt: skip
    adamw = torch.optim.AdamW(rest, betas=config.betas, eps=config.eps)
    steps(together, models[0], 3)
    for i in range(3):
        steps_of = torch.Generator().manual_seed(0)
        for _ in range(i + 1):
            grads = [torch.randn(p.shape, generator=steps_of) for p in models[1].parameters() if p.requires_grad]
        for p, g in zip((p for p in models[1].parameters() if p.requires_grad), grads):
            p.grad = g
        muon.step()
        adamw.step()
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw8bit"])
def test_an_optimizer_goes_on_from_its_state(name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    models = [tiny_model(dtype=torch.float32) for _ in range(2)]
    config = OptimizerConfig(name=name, lr=0.02)
    one, two = (make_optimizer(model, config) for model in models)
    steps(one, models[0], 2)
    models[1].load_state_dict(models[0].state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, model in ((one, models[0]), (two, models[1])):
        steps(optimizer, model, 2, seed=1)
    start = tiny_model(dtype=torch.float32).state_dict()
    for key, x in models[0].state_dict().items():
        assert torch.equal(x, models[1].state_dict()[key])
        assert not torch.equal(x, start[key]) or ".att.v" in key


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="adamw8bit: pip install bitsandbytes"):
        make_optimizer(tiny_model(), OptimizerConfig(name="adamw8bit"))


def test_a_run_with_muon_and_averaged_weights_goes_on(tmp_path, monkeypatch):
    """A checkpoint has Lightning's moving average of the weights; the run goes on from the weights themselves."""
    average = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}"
    recipe = RECIPE.replace("lr: 1.0e-2", "name: muon, lr: 1.0e-2") + f"  callbacks: [{average}]\n"
    recipe = recipe.replace("trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false}",
                            "trainer:\n  max_epochs: 2\n  accelerator: cpu\n  enable_progress_bar: false")  # fmt: skip
    monkeypatch.chdir(make_project(tmp_path / "project", recipe=recipe))
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "whole")
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "again", "--resume", "runs/whole/checkpoints/step-6")
    last = newest("runs/whole")
    (weights, training), (averaged, trained) = (
        load_checkpoint(f"runs/{x}/checkpoints/{last.name}") for x in ("again", "whole")
    )
    assert all(torch.equal(weights[key], averaged[key]) for key in weights)
    own = {key.removeprefix("model."): x for key, x in trained["current_model_state"].items()}
    assert all(
        torch.equal(x, trained["current_model_state"][key]) for key, x in training["current_model_state"].items()
    )
    assert not torch.equal(own["emb.weight"], averaged["emb.weight"])
