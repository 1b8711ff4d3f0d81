"""Parts of a model by patterns: what is frozen, what learns how fast, and what is said of it."""

import weakref

import pytest
import torch
from tiny import RECIPE, make_project, run, tiny_model

import infctx
from infctx.optim import OptimizerConfig, parameter_groups
from infctx.parts import Part, Silent, freeze, table


def test_the_last_part_that_matches_counts():
    model, parts = tiny_model(), (Part("*", train=False), Part("blocks.*.att.*", lr=0.5), Part("*.att.key.*", lr=0.1))
    freeze(model, parts)
    groups = parameter_groups(model, OptimizerConfig(lr=1.0, weight_decay=0.2), parts)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {g["name"]: (g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in groups}
    assert found["matrices of *.att.key.*"] == (0.1, 0.2, {f"blocks.{i}.att.key.weight" for i in range(2)})
    assert found["double of blocks.*.att.*"] == (1.0, 0.0, {f"blocks.{i}.att.w0" for i in range(2)})
    assert set(found) == {f"{kind} of blocks.*.att.*" for kind in ("matrices", "rest", "double")} | {
        "matrices of *.att.key.*"
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set().union(*(x[2] for x in found.values()))
    assert all(".att." in name for name in trained) and not any(".att.v0" in x and "blocks.0" in x for x in trained)


def test_weight_decay_of_a_part_is_of_its_matrices():
    parts = (Part("blocks.1.*", weight_decay=0.5),)
    groups = parameter_groups(tiny_model(), OptimizerConfig(lr=1.0, weight_decay=0.1), parts)
    decays = {g["name"]: g["weight_decay"] for g in groups}
    assert decays["matrices"] == 0.1 and decays["matrices of blocks.1.*"] == 0.5 and decays["rest of blocks.1.*"] == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part("blocks.9.*")], r"match 'blocks.9.\*': no parameter is named so; there are emb.weight, blocks.0"),
        ([Part("*", train=False)], "no parameter is left to train"),
        ([Part("emb*"), Part("emb*")], "is there twice"),
    ],
)
def test_bad_parts(parts, message):
    with pytest.raises(ValueError, match=message):
        freeze(tiny_model(), tuple(parts))


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"weight_decay": -0.1}, {"train": False, "lr": 0.1}])
def test_bad_numbers_of_a_part(bad):
    with pytest.raises(ValueError, match=r"model\.parts, match 'emb\.weight'"):
        Part("emb.weight", **bad)


def test_the_table_counts_every_parameter():
    model, parts = tiny_model(), (Part("emb.weight", train=False),)
    freeze(model, parts)
    groups = parameter_groups(model, OptimizerConfig(), parts)
    lines = table(model, [{**g, "initial_lr": g["lr"]} for g in groups]).splitlines()
    counts = [int(line[32:48].replace(",", "")) for line in lines[1:]]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert "emb.weight" in lines[-1] and lines[-1].startswith("as they are")


def test_a_parameter_without_a_gradient_is_warned_of():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2, bias=False)})
    silent, said = Silent(), []
    for step in range(12):
        for name, p in model.named_parameters():
            p.grad = torch.full_like(p, float("used" in name and step == 5))
        said.append(silent.look(model))
    assert said[:9] == [None] * 9 and said[10:] == [None] * 2
    assert said[9].endswith("so nothing was learnt: idle.weight")


def test_parameters_that_an_engine_replaces_are_not_kept():
    model = torch.nn.Linear(2, 2)
    silent, said, before = Silent(), [], weakref.ref(model.weight)
    for step in range(10):
        if step == 1:
            model.weight = torch.nn.Parameter(model.weight.detach().clone())
        for p in model.parameters():
            p.grad = torch.full_like(p, float(step == 5))
        said.append(silent.look(model))
    assert before() is None and said == [None] * 10


def test_frozen_weights_stay_to_the_bit(tmp_path, monkeypatch, capsys):
    """50 steps; and what is frozen is in no group of the optimizer."""
    recipe = RECIPE.replace(
        "  optimizer:", "  parts: [{match: emb.weight, train: false}, {match: '*.att.*', train: false}]\n  optimizer:"
    )
    project = make_project(tmp_path / "project", recipe=recipe)
    monkeypatch.chdir(project)
    infctx.save_model(tiny_model("rwkv7", torch.float32, 0.1, vocab_size=257), "start.pth")
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "a", "--model.load", "start.pth", "--model.init", "null",
        "--trainer.max_steps", "50", "--trainer.max_epochs", "20", "--checkpoint.every_n_steps", "50")  # fmt: skip
    before, after = infctx.load_model("start.pth").state_dict(), infctx.load_model("runs/a").state_dict()
    frozen = {name for name in before if name == "emb.weight" or ".att." in name}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    saved = torch.load("runs/a/checkpoints/step-50/training.pt", weights_only=True)["optimizer_states"][0]
    assert sum(len(g["params"]) for g in saved["param_groups"]) == len(before) - len(frozen)
    assert "as they are" in capsys.readouterr().out
