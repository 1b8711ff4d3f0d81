"""Text goes on from a prompt, the state carried token by token."""

import sys

import pytest
import torch
from tiny import tiny_model

import infctx
from infctx import generate as public
from infctx.generate import sample
from infctx.tokenizer import ByteTokenizer


def model():
    return tiny_model(dtype=torch.float32, vocab_size=257)


def test_greedy_equals_running_the_whole_text_each_time():
    net, prompt = model(), [5, 6, 7]
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(net(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert list(sample(net, prompt, 12, temperature=0)) == tokens[3:]


def test_long_prompts_go_in_stretches(monkeypatch):
    net, prompt = model(), torch.randint(1, 257, (70,)).tolist()
    whole = list(sample(net, prompt, 10, temperature=0))
    monkeypatch.setattr(sys.modules["infctx.generate"], "STRETCH", 16)
    assert list(sample(net, prompt, 10, temperature=0)) == whole


def test_seed_and_top_p():
    net = model()
    draws = [list(sample(net, [9], 30, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert list(sample(net, [9], 30, top_p=1e-9, seed=3)) == list(sample(net, [9], 30, temperature=0))


def test_draws_follow_the_probabilities():
    net = tiny_model(dtype=torch.float32, vocab_size=8)
    p = (net(torch.tensor([[3]]))[0][0, -1] / 0.7).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.8).sum()) + 1]
    expected = torch.zeros(8).scatter(0, kept, p[kept] / p[kept].sum())
    draws = [next(sample(net, [3], 1, 0.7, 0.8, seed), 0) for seed in range(3000)]
    counts = torch.bincount(torch.tensor(draws), minlength=8) / 3000
    assert (counts - expected).abs().max() < 0.03
    assert not counts[expected == 0].any()


def test_the_end_of_the_document_ends_the_text():
    net = model()
    with torch.no_grad():
        net.head.weight[0] = 1e3 * net.features(torch.tensor([[5]]))[0][0, -1]
    assert list(sample(net, [5], 10, temperature=0)) == []


def test_public_function():
    assert infctx.generate is public
    text = infctx.generate(model(), ByteTokenizer(), "abc", max_tokens=8, temperature=0.0)
    assert isinstance(text, str)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [("", {}, "prompt"), ("a", {"temperature": -1.0}, "temperature"), ("a", {"top_p": 0.0}, "top_p")],
)
def test_what_makes_no_sense_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        infctx.generate(model(), ByteTokenizer(), prompt, **options)
