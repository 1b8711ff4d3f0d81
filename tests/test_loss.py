"""Losses are summed, tiled over the tokens, and equal torch's."""

import pytest
import torch
import torch.nn.functional as F
from tiny import worst

from infctx.loss import TILE, token_losses


def case(tokens, dtype=torch.float64, vocab=37):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 16, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, 16, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[::5] = -100
    return x, weight, targets


@pytest.mark.parametrize("tokens", [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 3])
@pytest.mark.parametrize("l2", [0.0, 1e-2])
def test_equals_cross_entropy(tokens, l2):
    x, weight, targets = case(tokens)
    total, losses = token_losses(x, weight, targets, l2)
    logits = x @ weight.T
    expected = F.cross_entropy(logits, targets, reduction="none")
    penalty = torch.where(targets != -100, 0.5 * l2 * logits.max(-1).values ** 2, 0.0).sum()
    ours = torch.autograd.grad(total * 3, [x, weight])
    theirs = torch.autograd.grad((expected.sum() + penalty) * 3, [x, weight])
    assert worst([total, losses, *ours], [expected.sum() + penalty, expected, *theirs]) < 1e-13


def test_penalty_is_that_of_rwkv_lm():
    """RWKV-LM adds 1e-4 / tokens * (largest logit) to the gradient of the mean loss, at the largest logit."""
    logits = torch.randn(6, 9, dtype=torch.float64)
    eye = torch.eye(9, dtype=torch.float64)
    grads = []
    for l2 in (0.0, 1e-4):
        x = logits.clone().requires_grad_()
        total, _ = token_losses(x, eye, torch.arange(6), l2)
        grads.append(torch.autograd.grad(total / 6, x)[0])
    top, place = logits.max(-1, keepdim=True)
    assert torch.allclose(grads[1] - grads[0], torch.zeros_like(logits).scatter(1, place, 1e-4 / 6 * top), atol=1e-18)


def test_bfloat16_sums_in_float32():
    x, weight, targets = case(2000, torch.bfloat16)
    total, losses = token_losses(x, weight, targets)
    assert total.dtype == losses.dtype == torch.float32
    exact, _ = token_losses(x.double(), weight.double(), targets)
    assert float(total) == pytest.approx(float(exact), rel=2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = token_losses(x.float(), weight.float(), targets)
    assert float(mixed) == pytest.approx(float(total), rel=1e-6)


def test_logits_are_never_whole(monkeypatch):
    """(tokens x vocabulary) does not exist: no tile is larger than TILE tokens."""
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: sizes.append(len(a[0])) or linear(*a))
    x, weight, targets = case(5 * TILE)
    token_losses(x, weight, targets)[0].backward()
    assert max(sizes) == TILE and len(sizes) == 5


def test_frozen_head_gets_no_gradient():
    x, weight, targets = case(10)
    token_losses(x, weight.detach(), targets)[0].backward()
    assert x.grad is not None
