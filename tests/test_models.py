"""Laws 1-4 through whole models, the official initial values, and sizes read from weights."""

import random

import pytest
import torch
from tiny import ARCHS, VOCAB, make_window, random_state, relative, tiny_model, worst

import infctx
from infctx.segments import sequences
from infctx.state import pack, unpack

pytestmark = pytest.mark.parametrize("arch", ARCHS)


def tokens(b, t, seed=5):
    return torch.randint(VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def gradients(model, logits, state, *sources):
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    flat = pack(state)
    total = (logits * weight).sum() + (flat * torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype).view_as(flat)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(total, [*sources, *parameters])


@pytest.mark.parametrize("cuts", [[1], [17], [39], [5, 6, 30], list(range(1, 40))])
def test_split_anywhere_gives_same_gradients(arch, cuts):
    """Law 1 (and law 2, where every token is a piece)."""
    model, ids = tiny_model(arch), tokens(2, 40)
    flat = pack(random_state(model, 2)).requires_grad_()
    like = model.initial_state(1)
    logits, state = model(ids, unpack(flat, like))
    pieces, carried = [], unpack(flat, like)
    for begin, end in zip([0, *cuts], [*cuts, 40]):
        piece, carried = model(ids[:, begin:end], carried)
        pieces.append(piece)
    whole = [logits, pack(state), *gradients(model, logits, state, flat)]
    split = [torch.cat(pieces, 1), pack(carried), *gradients(model, torch.cat(pieces, 1), carried, flat)]
    assert worst(split, whole) < 1e-10


def test_rows_are_independent(arch):
    """Law 3."""
    model, ids = tiny_model(arch), tokens(3, 24)
    logits, state = model(ids)
    alone, own = model(ids[1:2])
    assert worst([alone, pack(own)], [logits[1:2], pack(state)[1:2]]) < 1e-12


def test_packed_documents_do_not_see_each_other(arch):
    """Law 4, with every state non-zero and a sequence without a token."""
    model, lengths = tiny_model(arch), [7, 1, 0, 30]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids, state = tokens(1, int(cu[-1])), random_state(model, 4)
    logits, after = model(ids, state, cu)
    for i, (begin, end) in enumerate(zip(cu[:-1], cu[1:])):
        own = type(state)(tuple(type(b)(*(x[i : i + 1] for x in b)) for b in state.blocks))
        alone, last = model(ids[:, begin:end], own)
        assert worst([alone, pack(last)], [logits[:, begin:end], pack(after)[i : i + 1]]) < 1e-12


def test_no_state_is_the_beginning(arch):
    model, ids = tiny_model(arch), tokens(2, 9)
    assert torch.equal(model(ids)[0], model(ids, model.initial_state(2))[0])
    assert torch.equal(model(ids[:, :0], random_state(model, 2))[1].blocks[0].wkv, random_state(model, 2).blocks[0].wkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32_in_every_precision(arch, dtype):
    model = tiny_model(arch, dtype)
    assert all(x.dtype == torch.float32 for block in model(tokens(2, 20))[1].blocks for x in block)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = tiny_model(arch, torch.float32)(tokens(2, 20))
    assert all(x.dtype == torch.float32 for block in state.blocks for x in block)
    assert relative(logits, tiny_model(arch)(tokens(2, 20))[0]) < 0.05


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_sizes_are_read_from_weights_in_any_order(arch, layers):
    config = infctx.ModelConfig(arch, layers, 64, 300, 16, 96, {"w": 40, "a": 8, "v": 16, "g": 24})
    weights = list(infctx.init_model(config).state_dict().items())
    random.Random(0).shuffle(weights)
    assert infctx.ModelConfig.from_weights(dict(weights)) == config


def test_initial_values_depend_on_the_seed_alone(arch):
    config = infctx.ModelConfig(arch, 2, 32, VOCAB, 16)
    torch.manual_seed(1)
    first = infctx.init_model(config, seed=3)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == drawn  # the global generator is left alone
    again, other = infctx.init_model(config, seed=3), infctx.init_model(config, seed=4)
    pairs = list(zip(first.parameters(), again.parameters()))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_official_initial_values(arch):
    """Spot values of the official trainer's rules, worked out by hand for C = 4, N = 2, layer 1 of 2."""
    model = infctx.init_model(infctx.ModelConfig(arch, 2, 4, 8, 2))
    att, ffn = model.blocks[1].att, model.blocks[1].ffn
    ratio = torch.arange(4) / 4
    expected = {
        "x_r": 1 - ratio**0.1, "x_w": 1 - ratio**0.45, "x_k": 1 - ratio**0.35, "x_g": 1 - ratio**0.1,
        "w0": torch.tensor([-6.0 + 0.5 - 2.5, -6 + 6 / 9 + 0.5 + 2.5, -6 + 24 / 9 + 0.5 - 2.5, 0.5 + 2.5]),
        "a0": torch.tensor([-0.19 - 0.3 - 0.2, -0.19 + 0.3 - 0.4 / 6, -0.19 - 0.3 + 0.4 / 6, -0.19 + 0.3 + 0.2]),
        "v0": torch.tensor([0.93, 0.73 + 0.4 / 6, 0.73 - 0.4 / 6, 0.53]), "k_a": torch.full((4,), 1.02),
        "k_k": torch.tensor([0.76, 0.71 + 0.1 / 6, 0.71 - 0.1 / 6, 0.66]), "r_k": torch.full((4,), -0.04),
        "w1": torch.zeros(4 * 32), "ln_x.weight": torch.ones(4), "output.weight": torch.zeros(16),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(att.get_parameter(name).flatten(), value, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(ffn.x_k.flatten(), 1 - ratio ** (0.5**4))
    torch.testing.assert_close(att.key.weight @ att.key.weight.T, 0.01 * torch.eye(4))
    torch.testing.assert_close(model.blocks[0].att.ln_x.weight, torch.full((4,), 0.5**0.7))
    torch.testing.assert_close(model.head.weight.T @ model.head.weight, 0.25 * 2 * torch.eye(4))
    assert model.emb.weight.abs().max() <= 1e-4 and not ffn.value.weight.any()


def test_padding_free_layout(arch):
    """A lane's padding changes nothing in the others, and the lane's own state passes it by."""
    window = make_window(3, 1, 8, starts=((0, 0, 0), (0, 0, 5), (2, 0, 0)), padding=((1, 0, 0), (2, 0, 3)))
    s = sequences(window, 0)
    assert s.cu_seqlens.tolist() == [0, 5, 8, 11]
    assert (s.lane.tolist(), s.fresh.tolist(), s.last.tolist()) == ([0, 0, 2], [True, True, True], [1, 4, 2])
