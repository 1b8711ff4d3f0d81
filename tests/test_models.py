"""Laws 1-4 through whole models, the official initial values, and sizes read from weights."""

import random

import pytest
import torch
from tiny import ARCHS, VOCAB, Carried, law, make_window, random_state, relative, tiny_model, values, worst

import infctx
from infctx.config import ARCHITECTURES
from infctx.segments import sequences
from infctx.state import select

pytestmark = pytest.mark.parametrize("arch", ARCHS)


def tokens(b, t, seed=5):
    return torch.randint(VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def gradients(model, logits, state, *sources):
    """Of a loss on the logits and on all that the state stands for."""
    total = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=logits.dtype).view_as(x)).sum() for x in [logits, *values(state)]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(total, [*sources, *trained], retain_graph=True)


@pytest.mark.parametrize("cuts", [[1], [17], [39], [5, 6, 30], list(range(1, 40))])
def test_split_anywhere_gives_same_gradients(arch, cuts, record_property):
    """Law 1 (and law 2, where every token is a piece)."""
    model, ids = tiny_model(arch), tokens(2, 40)
    given = Carried(random_state(model, 2))
    logits, state = model(ids, given.state())
    pieces, carried = [], given.state()
    for begin, end in zip([0, *cuts], [*cuts, 40]):
        piece, carried = model(ids[:, begin:end], carried)
        pieces.append(piece)
    pieces = torch.cat(pieces, 1)
    whole = [logits, *values(state), *gradients(model, logits, state, *given.sources)]
    split = [pieces, *values(carried), *gradients(model, pieces, carried, *given.sources)]
    law(record_property, 2 if len(cuts) == 39 else 1, arch, worst(split, whole), 1e-10)


def test_rows_are_independent(arch, record_property):
    """Law 3."""
    model, ids = tiny_model(arch), tokens(3, 24)
    start = random_state(model, 3)
    logits, state = model(ids, start)
    middle = torch.tensor([1])
    alone, own = model(ids[1:2], select(start, middle))
    law(
        record_property, 3, arch,
        worst([alone, *values(own)], [logits[1:2], *values(select(state, middle))]), 1e-12,
    )  # fmt: skip


def test_packed_documents_do_not_see_each_other(arch, record_property):
    """Law 4, with every state non-zero and a sequence without a token; also what one gives the others as gradient."""
    model, lengths = tiny_model(arch), [7, 1, 0, 30]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids, given = tokens(1, int(cu[-1])), Carried(random_state(model, 4))
    logits, after = model(ids, given.state(), cu)
    errors = []
    for i, (begin, end) in enumerate(zip(cu[:-1], cu[1:])):
        alone, last = model(ids[:, begin:end], given.row(i))
        own = select(after, torch.tensor([i]))
        errors.append(worst([alone, *values(last)], [logits[:, begin:end], *values(own)]))
        if end > begin:
            ours = gradients(model, logits[:, begin:end], own, *given.sources)
            errors.append(worst(ours, gradients(model, alone, last, *given.sources)))
    law(record_property, 4, arch, max(errors), 1e-10)


def test_no_state_is_the_beginning(arch):
    model, ids = tiny_model(arch), tokens(2, 9)
    assert torch.equal(model(ids)[0], model(ids, model.initial_state(2))[0])
    same = zip(values(model(ids[:, :0], random_state(model, 2))[1]), values(random_state(model, 2)))
    assert all(torch.equal(x, y) for x, y in same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32_in_every_precision(arch, dtype):
    model = tiny_model(arch, dtype)
    assert all(x.dtype == torch.float32 for block in model(tokens(2, 20))[1].blocks for x in block)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = tiny_model(arch, torch.float32)(tokens(2, 20))
    assert all(x.dtype == torch.float32 for block in state.blocks for x in block)
    assert relative(logits, tiny_model(arch)(tokens(2, 20))[0]) < 0.12


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_sizes_are_read_from_weights_in_any_order(arch, layers):
    if arch == "goldfinch":
        layers += 1
    ranks = {name: 8 * (i + 1) for i, name in enumerate(ARCHITECTURES[arch].ranks)}
    config = infctx.ModelConfig(arch, layers, 64, 300, 16, 96, ranks, 1 if arch == "goldfinch" else None)
    weights = list(infctx.init_model(config).state_dict().items())
    random.Random(0).shuffle(weights)
    assert infctx.ModelConfig.from_weights(dict(weights)) == config


def test_cu_seqlens_that_do_not_fit_are_refused(arch):
    model, ids = tiny_model(arch), tokens(1, 5)
    for borders in ([0, 3], [1, 5], [0, 4, 2, 5]):
        with pytest.raises(ValueError, match=r"cu_seqlens|state holds"):
            model(ids, None, torch.tensor(borders).int())
    with pytest.raises(ValueError, match="state holds 2 sequences, tokens are 1"):
        model(ids, random_state(model, 2))


def test_no_sequence_at_all(arch):
    model = tiny_model(arch)
    for shape in ((0, 1), (0, 5), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.long))[0].shape == (*shape, VOCAB)


def test_states_own_their_memory(arch):
    """A view would keep every token of the call alive, and write all of them into a file."""
    model = tiny_model(arch)
    state = model(tokens(1, 50))[1]
    for block in (*state.blocks, *model.initial_state(1).blocks):
        assert all(x.untyped_storage().nbytes() <= max(x.nbytes, 8 * 32) for x in block)


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


def test_padding_free_layout(arch):
    """A lane's padding changes nothing in the others, and the lane's own state passes it by."""
    window = make_window(3, 1, 8, starts=((0, 0, 0), (0, 0, 5), (2, 0, 0)), padding=((1, 0, 0), (2, 0, 3)))
    s = sequences(window, 0)
    assert s.cu_seqlens.tolist() == [0, 5, 8, 11]
    assert (s.lane.tolist(), s.fresh.tolist(), s.last.tolist()) == ([0, 0, 2], [True, True, True], [1, 4, 2])
