"""Every published size builds on the meta device, with the published number of parameters, state, names and shapes."""

import pytest
import torch

from infctx.models.rwkv import RWKV
from infctx.sizes import SIZES, sized

# RWKV-4: 2VC + 13 C^2 L + C (11 L + 4) of arXiv:2305.13048; RWKV-5 and 6: the tables of arXiv:2404.05892, in millions;
# RWKV-7: arXiv:2503.14456, whose counts leave out layer 0's unused value residual; GoldFinch: its trainer's shapes.
PARAMETERS = {
    ("rwkv4", "0.1b"): 169_342_464, ("rwkv4", "0.4b"): 430_397_440, ("rwkv4", "1.5b"): 1_515_106_304,
    ("rwkv4", "3b"): 2_984_627_200, ("rwkv4", "7b"): 7_392_649_216, ("rwkv4", "14b"): 14_148_597_760,
    ("rwkv5", "0.4b"): 462e6, ("rwkv5", "1.5b"): 1.58e9, ("rwkv5", "3b"): 3.06e9, ("rwkv5", "7b"): 7.52e9,
    ("rwkv6", "1.6b"): 1.60e9, ("rwkv6", "3b"): 3.10e9, ("rwkv6", "7b"): 7.64e9, ("rwkv6", "14b"): 14.07e9,
    ("rwkv7", "0.1b"): 191_034_624, ("rwkv7", "0.4b"): 450_767_872, ("rwkv7", "1.5b"): 1_527_404_544,
    ("rwkv7", "2.9b"): 2_947_735_040, ("rwkv7", "7.2b"): 7.2e9, ("rwkv7", "13.3b"): 13.3e9,
    ("goldfinch", "0.2b"): 187e6, ("goldfinch", "1.5b"): 1.445e9,
}  # fmt: skip
UNUSED = [f"blocks.0.att.v{i}" for i in range(3)]
ALL = [(arch, size) for arch, rows in SIZES.items() for size in rows]


def build(arch, size):
    with torch.device("meta"):
        return RWKV(sized(arch, size))


@pytest.mark.parametrize(("arch", "size"), ALL)
def test_parameters_and_state(arch, size):
    model = build(arch, size)
    c = model.config
    count = sum(p.numel() for p in model.parameters())
    if arch == "rwkv7":
        count -= sum(p.numel() for name, p in model.named_parameters() if name in UNUSED)
    if (arch, size) in PARAMETERS:
        published = PARAMETERS[arch, size]
        assert count == published if isinstance(published, int) else abs(count / published - 1) < 0.006
    state = model.initial_state(1)
    matrices = 3 * c.n_embd if arch == "rwkv4" else 64 * c.n_embd
    assert sum(b.wkv.numel() for b in state.blocks) == (c.n_layer - (c.n_gold or 0)) * matrices
    assert sum(b.att_shift.numel() + b.ffn_shift.numel() for b in state.blocks) == 2 * c.n_layer * c.n_embd
    print(f"{arch} {size}: {count:,} parameters, state {sum(x.numel() for b in state.blocks for x in b):,}")


# Names and shapes as the trainers register them; C channels, F inner, A = C, ranks as published.
NAMES = {
    ("rwkv4", "0.1b"): {
        "att.time_decay": (768,), "att.time_first": (768,), "att.time_mix_k": (1, 1, 768),
        "ffn.time_mix_r": (1, 1, 768),
        "ffn.key.weight": (3072, 768), "ffn.receptance.weight": (768, 768),
    },
    ("rwkv5", "3b"): {
        "att.time_decay": (40, 64), "att.time_faaaa": (40, 64), "att.time_mix_g": (1, 1, 2560),
        "att.ln_x.bias": (2560,),
        "att.gate.weight": (2560, 2560), "ffn.key.weight": (8960, 2560), "ffn.value.weight": (2560, 8960),
    },
    ("rwkv6", "1.6b"): {
        "att.time_maa_x": (1, 1, 2048), "att.time_maa_w1": (2048, 160), "att.time_maa_w2": (5, 32, 2048),
        "att.time_decay": (1, 1, 2048), "att.time_decay_w1": (2048, 64), "att.time_decay_w2": (64, 2048),
        "att.time_faaaa": (32, 64), "ffn.time_maa_k": (1, 1, 2048), "ffn.key.weight": (7168, 2048),
    },
    ("rwkv6", "7b"): {"att.time_maa_w1": (4096, 320), "att.time_decay_w1": (4096, 128)},
    ("rwkv7", "1.5b"): {
        "att.x_r": (1, 1, 2048), "att.w0": (1, 1, 2048), "att.w1": (2048, 96), "att.w2": (96, 2048),
        "att.a1": (2048, 96), "att.v1": (2048, 64), "att.g1": (2048, 256), "att.g2": (256, 2048), "att.r_k": (32, 64),
        "att.k_k": (1, 1, 2048), "att.ln_x.weight": (2048,), "ffn.x_k": (1, 1, 2048), "ffn.key.weight": (8192, 2048),
    },
    ("rwkv7a", "0.1b"): {
        "ffn.s_emb.weight": (65536, 1024), "ffn.s_emb_x.weight": (1024, 768), "ffn.s1": (768, 32), "ffn.s2": (32, 3072),
    },
    ("goldfinch", "0.2b"): {
        "att.time_maa_w1": (768, 160), "att.time_value2_w1": (768, 64), "att.time_faaaa": (12, 64),
        "ffn.key.weight": (2688, 768), "att.time_maa_v2": (1, 1, 768),
    },
}  # fmt: skip


@pytest.mark.parametrize(("arch", "size"), NAMES)
def test_names_and_shapes(arch, size):
    shapes = {name: tuple(x.shape) for name, x in build(arch, size).state_dict().items()}
    c, v = shapes["emb.weight"][1], shapes["emb.weight"][0]
    expected = {"emb.weight": (v, c), "head.weight": (v, c), "ln_out.bias": (c,), "blocks.0.ln0.weight": (c,)}
    expected |= {f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in NAMES[arch, size].items()}
    assert {name: shapes.get(name) for name in expected} == expected
    assert "blocks.1.ln0.weight" not in shapes


def test_goldfinch_attention_layers():
    shapes = {name: tuple(x.shape) for name, x in build("goldfinch", "0.2b").state_dict().items()}
    gold = {name.removeprefix("blocks.8.att."): x for name, x in shapes.items() if name.startswith("blocks.8.att.")}
    one, norm = (1, 1, 768), {f"ln_{x}.{part}": (768,) for x in "qkvx" for part in ("weight", "bias")}
    assert gold == norm | {
        "time_maa_x": one, "time_maa_q": one, "time_maa_k": one, "time_maa_v": one, "time_maa_v_cache": one,
        "time_maa_q_w1": (768, 32), "time_maa_q_w2": (32, 768), "time_maa_kv_w1": (768, 64),
        "time_maa_kv_w2": (2, 32, 768), "time_key_w1": (768, 64), "time_key_w2": (64, 768), "time_value_w1": (768, 64),
        "time_value_w2": (64, 768), "query.weight": (768, 768), "output.weight": (768, 768),
    }  # fmt: skip
    assert shapes["w_kv_cache_a.weight"] == (48, 768) and shapes["w_kv_cache_b.weight"] == (768, 816)
    assert "blocks.7.att.time_value2_w1" in shapes


def test_sizes_that_are_not_known():
    with pytest.raises(ValueError, match=r"size '9b' of rwkv7 is not known; choose one of: 0.1b"):
        sized("rwkv7", "9b")
    with pytest.raises(ValueError, match="n_embd must be given"):
        sized("rwkv6", n_layer=3, vocab_size=9)
    assert sized("rwkv7", "0.4B", n_layer=2).n_layer == 2
