"""Engines that cut up what is trained make the steps of one rank, from its checkpoints and to them."""

import itertools
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import RECIPE, make_project, relative, run, tiny_model, worst

import infctx
from infctx.checkpoint import load_checkpoint, verify

HERE = Path(__file__).parent
OVERLAYS = HERE.parent / "recipes" / "strategy"
STRATEGIES = ["zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "fsdp2"]
STEPS = ["--trainer.max_steps", "5", "--trainer.max_epochs", "9", "--trainer.logger", "false",
         "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "9"]  # fmt: skip
LENGTHS = (100, 37, 230, 61, 5, 150, 80, 12, 199, 44, 90, 130)  # three windows of whole documents in two lanes
WAYS = {
    "documents": ["--model.load", "rwkv7.pth", "--data.segments_per_window", "document",
                  "--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.05"],
    "frozen": ["--model.load", "rwkv6.pth", "--model.horizon", "2", "--data.validation", "3",
               "--trainer.val_check_interval", "2"],
    "bf16": ["--model.load", "rwkv7.pth", "--trainer.precision", "bf16-mixed"],
    "shared": ["--model.load", "rwkv7.pth", "--trainer.accumulate_grad_batches", "2"],
}  # fmt: skip
# Which go on from which others' checkpoints.
GOES_ON = [("zero2", "zero3"), ("zero3-offload", "fsdp2"), ("fsdp2", "zero1"), ("one", "zero2-offload")]
# How ranks that share their lanes run a window.
SCHEDULES = {"zero1": "wavefront", "zero2": "wavefront", "zero3": "scan", "fsdp2": "scan"}
BY_WAY = {"documents": STRATEGIES, "frozen": ["zero2", "zero3", "fsdp2"], "bf16": ["zero1", "zero2", "zero3", "fsdp2"]}


def strategy(name):
    options = ["-c", str(OVERLAYS / f"{name}.yaml"), "--trainer.devices", "2", "--data.batch_size", "1"]
    if name.startswith("zero3"):  # or DeepSpeed would keep all weights of so small a model whole
        options.append('--trainer.strategy.init_args.options={"stage3_param_persistence_threshold": 0}')
    return options


def shared(name, lanes):
    return [*strategy(name), *STEPS, *WAYS["shared"], "--parallel.time", "2", "--parallel.schedule", SCHEDULES[name],
            "--data.batch_size", str(lanes)]  # fmt: skip


def fit(project, ranks, cases, timeout=300):
    """Run each case on so many processes of one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1]) if ranks > 1 else "0"
    run_ranks("strategy_ranks.py", ranks, project, port, project, json.dumps(cases), timeout=timeout)


def project_at(folder, archs=("rwkv6", "rwkv7")):
    make_project(folder, LENGTHS, RECIPE.replace("warmup_steps: 2", "warmup_steps: 0"))
    for arch in archs:
        layers = 3 if arch == "goldfinch" else 2
        infctx.save_model(tiny_model(arch, torch.float32, 0.1, vocab_size=257, n_layer=layers), folder / f"{arch}.pth")
    return folder


def rows(project, name):
    return [json.loads(x) for x in (project / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def checkpoint(project, name, step):
    return load_checkpoint(project / "runs" / name / "checkpoints" / f"step-{step}")


def first_gradient(project, name):
    """AdamW's first moment after one step is a tenth of what it was given."""
    state = checkpoint(project, name, 1)[1]["optimizer_states"][0]["state"]
    return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """One test, for what takes time is to run two ranks, not to compare what they leave."""
    project = project_at(tmp_path / "project")
    fit(project, 1, {f"one-{way}": [*STEPS, *options] for way, options in WAYS.items()})
    cases = {f"{name}-{way}": [*strategy(name), *STEPS, *WAYS[way]] for way, names in BY_WAY.items() for name in names}
    for after, name in GOES_ON:
        resume = ["--resume", f"runs/{after}-documents/checkpoints/step-2"]
        cases[f"{name}-after-{after}"] = [*strategy(name), *STEPS, *WAYS["documents"], *resume]
    cases |= {f"{name}-shared": shared(name, 2) for name in SCHEDULES}
    fit(project, 2, cases)
    for name in SCHEDULES:
        same_steps(project, name, "shared")
    for name in STRATEGIES:
        halves(project / "runs" / f"{name}-documents" / "checkpoints" / "step-5")
    for way in ("documents", "frozen"):
        for name in BY_WAY[way]:
            same_steps(project, name, way)
    for after, name in GOES_ON:
        goes_on_as_one(project, f"{name}-after-{after}")
    for name in ("one", *BY_WAY["frozen"]):
        frozen_weights_stay(project, name)
        same_validation(project, name, "frozen")
    for name in BY_WAY["bf16"]:
        bfloat16_stays_close(project, name)
    monkeypatch.chdir(project)
    for name in ("zero2", "zero3"):
        resume = ["--resume", f"runs/{name}-documents/checkpoints/step-2"]
        run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", f"after-{name}", *STEPS, *WAYS["documents"], *resume)
        goes_on_as_one(project, f"after-{name}")
    for name in ("zero3", "fsdp2"):
        run(monkeypatch, "export", f"runs/{name}-documents", f"{name}.pth")
        weights, _ = checkpoint(project, f"{name}-documents", 5)
        exported = infctx.load_model(f"{name}.pth").state_dict()
        assert weights.keys() == exported.keys() and all(torch.equal(exported[k], weights[k]) for k in weights)


def same_steps(project, name, way):
    one, two = rows(project, f"one-{way}"), rows(project, f"{name}-{way}")
    counts = [[(x["step"], x["tokens"], x["documents"], x["lr"]) for x in run] for run in (one, two)]
    assert len(one) == 5 and counts[0] == counts[1], (name, way)
    for x, y in zip(two, one):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5), (name, way)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4), (name, way)
        borders = [dict(line.get("border_gradient", [])) for line in (x, y)]
        assert borders[0] == pytest.approx(borders[1], rel=1e-3), (name, way)
    assert any("border_gradient" in y for y in one), way
    samples = [json.loads((project / "runs" / f"{x}-{way}" / "samples.json").read_text()) for x in (name, "one")]
    for texts in zip(*samples, strict=True):
        ours, theirs = ([loss for part in x["parts"] for _, losses in part["pieces"] for loss in losses[-1:]]
                        for x in texts)  # fmt: skip
        assert ours[1:] == pytest.approx(theirs[1:], abs=2e-3) and max(theirs[1:]) > 0.1, (name, way)
    assert relative(first_gradient(project, f"{name}-{way}"), first_gradient(project, f"one-{way}")) <= 1e-6, name
    (ours, _), (theirs, _) = (checkpoint(project, f"{x}-{way}", 5) for x in (name, "one"))
    assert ours.keys() == theirs.keys()
    assert worst([ours[k] for k in theirs], list(theirs.values())) <= 1e-5, (name, way)


def halves(folder):
    sizes = {name: fact["bytes"] for name, fact in verify(folder)["files"].items()}
    assert set(sizes) == {f"{kind}-0000{rank}-of-00002.{end}" for rank in (1, 2)
                          for kind, end in (("model", "safetensors"), ("training", "pt"))}  # fmt: skip
    for pair in ("model", "training"):
        one, other = (size for name, size in sizes.items() if name.startswith(pair))
        assert 0.8 < one / other < 1.25, (folder, sizes)


def same_validation(project, name, way):
    losses = [
        [json.loads(x)["loss"] for x in (project / "runs" / f"{x}-{way}" / "validation.jsonl").read_text().splitlines()]
        for x in ("one", name)
    ]
    assert len(losses[0]) >= 2 and losses[1] == pytest.approx(losses[0], rel=1e-5), name


def goes_on_as_one(project, name):
    one, ours = rows(project, "one-documents")[2:], rows(project, name)
    assert [x["step"] for x in ours] == [x["step"] for x in one] and len(ours) == 3, name
    for x, y in zip(ours, one):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5), name
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4), name
    (weights, _), (expected, _) = (checkpoint(project, x, 5) for x in (name, "one-documents"))
    assert worst([weights[k] for k in expected], list(expected.values())) <= 1e-5, name


def frozen_weights_stay(project, name):
    weights, _ = checkpoint(project, f"{name}-frozen", 5)
    start = infctx.load_model(project / "rwkv6.pth").state_dict()
    same = {key for key, x in weights.items() if torch.equal(x, start[key])}
    assert {key for key in start if key.startswith(("blocks.0.att", "emb"))} <= same < start.keys(), name


def bfloat16_stays_close(project, name):
    """DeepSpeed and FSDP2 compute in bfloat16 throughout, autocast where it pays only."""
    one, two = rows(project, "one-bf16"), rows(project, f"{name}-bf16")
    assert len(two) == 5 and two[-1]["loss"] < 0.9 * two[0]["loss"], name
    for x, y in zip(two, one):
        assert x["loss"] == pytest.approx(y["loss"], rel=2e-2), name
    weights, _ = checkpoint(project, f"{name}-bf16", 1)
    assert any(not torch.equal(x, x.bfloat16().float()) for x in weights.values()), name  # the float32 ones are saved


def test_lightnings_own_engines_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    for name in ("fsdp", "deepspeed_stage_2"):
        with pytest.raises(SystemExit):
            run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "x", "--trainer.strategy", name)
        assert f"trainer.strategy {name} is not supported: choose auto, ddp or a file" in capsys.readouterr().err


@pytest.mark.slow
def test_four_ranks_equal_one(tmp_path):
    folder = project_at(tmp_path / "project")
    ways = {way: WAYS[way] for way in ("documents", "frozen", "shared")}
    four = ["--trainer.devices", "4", "--data.batch_size", "1"]
    fit(folder, 1, {f"one-{way}": [*STEPS, *options, "--data.batch_size", "4"] for way, options in ways.items()})
    cases = {
        f"{name}-{way}": [*strategy(name), *STEPS, *options, *four]
        for (way, options), name in itertools.product(ways.items(), ("zero2", "zero3", "fsdp2"))
        if way != "shared"
    }
    cases |= {f"{name}-shared": [*shared(name, 2), "--trainer.devices", "4"] for name in ("zero2", "zero3", "fsdp2")}
    fit(folder, 4, cases)
    for way, name in itertools.product(ways, ("zero2", "zero3", "fsdp2")):
        same_steps(folder, name, way)
    after = ["--resume", "runs/zero3-documents/checkpoints/step-2"]
    for ranks, name, lanes in ((1, "one", 4), (2, "fsdp2", 2), (2, "zero2", 2)):
        options = [] if name == "one" else strategy(name)
        case = [*options, *STEPS, *WAYS["documents"], *after, "--data.batch_size", str(lanes)]
        fit(folder, ranks, {f"{name}-after-four": case})
        goes_on_as_one(folder, f"{name}-after-four")


@pytest.mark.slow
def test_every_architecture(tmp_path):
    archs, options = ("rwkv4", "rwkv5", "rwkv7a", "goldfinch"), [*STEPS, *WAYS["documents"][2:]]
    folder = project_at(tmp_path / "project", archs)
    fit(folder, 1, {f"one-{arch}": ["--model.load", f"{arch}.pth", *options] for arch in archs})
    cases = {
        f"{name}-{arch}": [*strategy(name), "--model.load", f"{arch}.pth", *options]
        for name, arch in itertools.product(("zero2", "zero3", "fsdp2"), archs)
    }
    fit(folder, 2, cases, 600)
    for name, arch in itertools.product(("zero2", "zero3", "fsdp2"), archs):
        same_steps(folder, name, arch)


@pytest.mark.slow
def test_uneven_documents_never_hang(tmp_path):
    """Windows of whole documents, of which some ranks have none left in the last segments."""
    random, cases, one = np.random.default_rng(4), {}, {}
    folder = project_at(tmp_path / "project")
    common = [*STEPS, "--trainer.max_steps", "2", *WAYS["documents"]]
    for i in range(10):
        make_project(folder / f"{i}", lengths=random.integers(2, 200, 6).tolist())
        data = ["--data.source.path", f"{i}/texts/*.txt", "--data.path", f"{i}/prepared"]
        one[f"one-{i}"] = [*common, *data]
        for name in ("zero3", "fsdp2", "zero2"):
            cases[f"{name}-{i}"] = [*strategy(name), *common, *data]
    fit(folder, 1, one, 600)
    fit(folder, 2, cases, 600)
    for case in cases:
        expected = f"one-{case.rsplit('-', 1)[1]}"
        assert relative(first_gradient(folder, case), first_gradient(folder, expected)) <= 1e-6, case
