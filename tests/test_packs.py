"""Documents that share a pack: what one holds changes not one bit of what the others give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHS, VOCAB, Carried, random_state, tiny_model, values

from infctx.state import select

PACKS = 200


def pack(model, state, ids, targets, cu, left_out):
    """Logits, losses and last states of all documents but one; the gradient of the sum of those losses and states."""
    given = Carried(state)
    logits, after = model(ids, given.state(), cu)
    losses = F.cross_entropy(logits[0], targets, reduction="none")
    others = torch.tensor([i for i in range(len(cu) - 1) if i != left_out])
    spans = [slice(cu[i], cu[i + 1]) for i in others]
    by_document = torch.stack([losses[x].sum() for x in spans])
    last = values(select(after, others))
    trained = [p for p in model.parameters() if p.requires_grad]
    total = by_document.sum() + sum(x.square().sum() for x in last)
    gradients = torch.autograd.grad(total, [*given.sources, *trained])
    return [*(logits[0, x] for x in spans), by_document, *last, *gradients]


def check(arch, packs):
    """Each of these packs twice: as it is, and with other tokens in one of its documents."""
    models = [tiny_model(arch, dtype) for dtype in (torch.float32, torch.float64)]
    for number in packs:
        model, random = models[number % 2], np.random.default_rng(number)
        generator = torch.Generator().manual_seed(number)
        lengths = random.integers(1, 30, random.integers(2, 7))
        cu = torch.tensor([0, *lengths.cumsum()]).int()
        one = int(random.integers(len(lengths)))
        ids, targets = torch.randint(VOCAB, (2, 1, int(cu[-1])), generator=generator)
        state = random_state(model, len(lengths), number)
        expected = pack(model, state, ids, targets[0], cu, one)
        span = slice(cu[one], cu[one + 1])
        for x in (ids, targets):  # each token another one
            x[:, span] = (x[:, span] + torch.randint(1, VOCAB, x[:, span].shape, generator=generator)) % VOCAB
        found = pack(model, state, ids, targets[0], cu, one)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), f"pack {number}, document {one}"


@pytest.mark.parametrize("arch", ARCHS)
def test_the_others_are_the_same_bits(arch):
    """The architectures share the packs out."""
    check(arch, range(ARCHS.index(arch), PACKS, len(ARCHS)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_others_are_the_same_bits_in_every_pack(arch):
    check(arch, range(PACKS))
