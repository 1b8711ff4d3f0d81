"""Official initial values, by hand from the trainers' rules for C = 4, N = 2, layer 1 of 2 (GoldFinch: of 3)."""

import math

import pytest
import torch

import infctx

RATIO = torch.arange(4) / 4


def blocks(arch, layers=2):
    model = infctx.init_model(infctx.ModelConfig(arch, layers, 4, 8, 2))
    return model, model.blocks[1]


def check(module, expected):
    for name, value in expected.items():
        torch.testing.assert_close(module.get_parameter(name).flatten(), value, msg=lambda m, n=name: f"{n}: {m}")


def gain(module, name):
    """What an orthogonal matrix is scaled by."""
    weight = module.get_parameter(name)
    square = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    scale = round(float(square.detach().diagonal().mean()) ** 0.5, 5)
    torch.testing.assert_close(square, scale**2 * torch.eye(len(square)), atol=1e-5, rtol=1e-5)
    return scale


@pytest.mark.parametrize("arch", sorted(infctx.config.ARCHITECTURES))
def test_embedding_and_head(arch):
    model, block = blocks(arch, 3 if arch == "goldfinch" else 2)
    assert gain(model.head, "weight") == pytest.approx(0.5 * 2**0.5, rel=1e-5)
    assert 0 < model.emb.weight.abs().max() <= 1e-4
    assert not block.ffn.value.weight.any() and not block.att.output.weight.any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_rwkv4():
    _, block = blocks("rwkv4")
    decay = torch.tensor([-5.0, -5 + 8 / 9, -5 + 32 / 9, 3.0])
    check(block.att, {
        "time_decay": decay, "time_first": math.log(0.3) + torch.tensor([0.0, 0.5, -0.5, 0.0]),
        "time_mix_k": RATIO**0.5, "time_mix_v": RATIO**0.5 + 0.3, "time_mix_r": RATIO**0.25,
    })  # fmt: skip
    check(block.ffn, {"time_mix_k": RATIO**0.5, "time_mix_r": RATIO**0.5})
    assert not block.att.key.weight.any() and not block.att.receptance.weight.any()
    assert not block.ffn.receptance.weight.any()
    assert gain(block.ffn, "key.weight") == pytest.approx((32 / 4) ** 0.5, rel=1e-5)
    assert gain(block.att, "value.weight") == 1


def test_rwkv5():
    _, block = blocks("rwkv5")
    check(block.att, {
        "time_decay": torch.tensor([-6.0, -6 + 5 / 9, -6 + 20 / 9, -1.0]),
        "time_faaaa": torch.tensor([1.0, 2 / 3 + 0.1, 1 / 3 - 0.1, 0.0]), "time_mix_g": RATIO**0.25,
        "time_mix_k": RATIO**0.5, "time_mix_v": RATIO**0.5 + 0.3, "ln_x.weight": torch.ones(4),
    })  # fmt: skip
    assert gain(block.att, "key.weight") == pytest.approx(0.1) == gain(block.att, "gate.weight")
    assert gain(block.ffn, "key.weight") == pytest.approx(1) == gain(block.att, "receptance.weight")
    for arch in ("rwkv5.0", "rwkv5.1"):
        check(blocks(arch)[1].att, {"time_first": torch.full((2,), -3.0), "time_decay": torch.tensor([-6.0, -1.0])})


def test_rwkv6():
    _, block = blocks("rwkv6")
    check(block.att, {
        "time_decay": torch.tensor([-6.0, -6 + 5 / 9, -6 + 20 / 9, -1.0]), "time_maa_x": 1 - RATIO**0.5,
        "time_faaaa": torch.tensor([1.0, 2 / 3 + 0.1, 1 / 3 - 0.1, 0.0]), "time_maa_g": 1 - RATIO**0.25,
        "time_maa_v": 1 - (RATIO**0.5 + 0.3), "time_maa_w1": torch.zeros(4 * 160), "time_decay_w1": torch.zeros(4 * 64),
    })  # fmt: skip
    check(block.ffn, {"time_maa_k": 1 - RATIO**0.125, "time_maa_r": 1 - RATIO**0.125})
    assert 0.009 < block.att.time_maa_w2.abs().max() <= 0.01
    assert gain(block.att, "key.weight") == pytest.approx(0.1) == gain(block.att, "gate.weight")


def test_rwkv7():
    model, block = blocks("rwkv7")
    check(block.att, {
        "x_r": 1 - RATIO**0.1, "x_w": 1 - RATIO**0.45, "x_k": 1 - RATIO**0.35, "x_g": 1 - RATIO**0.1,
        "w0": torch.tensor([-6.0 + 0.5 - 2.5, -6 + 6 / 9 + 0.5 + 2.5, -6 + 24 / 9 + 0.5 - 2.5, 0.5 + 2.5]),
        "a0": torch.tensor([-0.19 - 0.3 - 0.2, -0.19 + 0.3 - 0.4 / 6, -0.19 - 0.3 + 0.4 / 6, -0.19 + 0.3 + 0.2]),
        "v0": torch.tensor([0.93, 0.73 + 0.4 / 6, 0.73 - 0.4 / 6, 0.53]), "k_a": torch.full((4,), 1.02),
        "k_k": torch.tensor([0.76, 0.71 + 0.1 / 6, 0.71 - 0.1 / 6, 0.66]), "r_k": torch.full((4,), -0.04),
        "w1": torch.zeros(4 * 32), "ln_x.weight": torch.ones(4),
    })  # fmt: skip
    check(block.ffn, {"x_k": 1 - RATIO ** (0.5**4)})
    check(model.blocks[0].att, {"ln_x.weight": torch.full((4,), 0.5**0.7)})
    assert gain(block.att, "key.weight") == pytest.approx(0.1)


def test_rwkv7a_begins_as_rwkv7():
    tokens = torch.arange(8).view(1, 8)
    plain, deep = (infctx.init_model(infctx.ModelConfig(arch, 2, 4, 8, 2)) for arch in ("rwkv7", "rwkv7a"))
    shared = {name: p for name, p in deep.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(shared)
    for model in (plain, deep):
        torch.nn.init.constant_(model.blocks[0].ffn.value.weight, 0.1)
    assert torch.equal(plain(tokens)[0], deep(tokens)[0])


def test_goldfinch():
    model, block = blocks("goldfinch", 3)
    down, up = 2 / 3, 0.5
    power = 0.7 + 1.3 * up
    check(block.att, {
        "time_decay": -6 + 5 * (torch.arange(4) / 3) ** power, "time_maa_w": 1 - RATIO**down,
        "time_maa_r": 1 - RATIO ** (0.5 * down), "time_maa_v2": 1 - (RATIO**down + 0.3 * up),
        "time_value2_w1": torch.zeros(4 * 64), "ln_x.weight": torch.full((4,), (2 / 3) ** 0.7),
    })  # fmt: skip
    check(block.ffn, {"time_maa_k": 1 - RATIO**down, "time_maa_r": 1 - RATIO**down})
    gold = model.blocks[2].att
    check(gold, {
        "time_maa_q": 1 - RATIO ** (1 / 6), "time_maa_v": 1 - (RATIO ** (1 / 3) + 0.3), "ln_k.weight": torch.ones(4),
        "time_maa_v_cache": 1 - RATIO ** (1 / 3), "time_key_w1": torch.zeros(4 * 64), "ln_x.weight": torch.ones(4),
    })  # fmt: skip
    assert gain(gold, "query.weight") == pytest.approx(1) == gain(model, "w_kv_cache_b.weight")
    assert gain(block.att, "key.weight") == pytest.approx(0.1)
