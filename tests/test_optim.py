"""Groups, rates and their schedule."""

import pytest
import torch
from tiny import tiny_model

from infctx.optim import OptimizerConfig, learning_rate_factor, make_optimizer, make_schedule, parameter_groups


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
    factor = learning_rate_factor(OptimizerConfig(lr=1e-3, warmup_steps=4, final_lr=1e-4), 24)
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0 and factor(14) == pytest.approx(0.55) and factor(24) == factor(1000) == pytest.approx(0.1)


def test_constant_after_warm_up():
    factor = learning_rate_factor(OptimizerConfig(schedule="constant", warmup_steps=2), 10)
    assert [factor(i) for i in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]


def test_all_groups_follow_the_schedule():
    config = OptimizerConfig(lr=1e-3, warmup_steps=2)
    optimizer = make_optimizer(tiny_model(), config)
    schedule = make_schedule(optimizer, config, 10)
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
