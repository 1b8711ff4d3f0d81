"""Law 9: each target token exactly once an epoch, on any number of lanes and ranks, in any order of asking."""

import numpy as np
import pytest
import torch

from infctx.loader import WindowLoader
from infctx.segments import Plan

LENGTHS = np.array([int(x) for x in 10 ** np.random.default_rng(0).uniform(0, 4, 300)], dtype=np.int64)


class Memory:
    """Documents whose every token tells where it is from."""

    def __init__(self, lengths, masked=False):
        self.inputs = lengths
        self.masked = masked
        self.supervised = np.array([int(self.mask(d, 1, n + 1).sum()) for d, n in enumerate(lengths)])

    def tokens(self, document, begin, end):
        return document * 100_000 + np.arange(begin, end)

    def mask(self, document, begin, end):
        return np.arange(begin, end) % 3 != document % 3 if self.masked else np.ones(end - begin, bool)


def loaders(documents, lanes, ranks, segments, epoch=0, accumulate=1, length=32, seed=1):
    def plan(e):
        return Plan(documents.inputs, lanes, length, segments, seed, e)

    size = lanes // ranks
    return [
        WindowLoader(documents, plan, range(r * size, (r + 1) * size), accumulate, epoch, {"data.seed": seed})
        for r in range(ranks)
    ]


@pytest.mark.parametrize("segments", [1, 4, None])
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_each_token_once(segments, lanes):
    documents = Memory(LENGTHS)
    (loader,) = loaders(documents, lanes, 1, segments)
    seen = []
    for window in loader:
        real = window.ids >= 0
        assert torch.equal(window.targets[real], window.tokens[real] + 1)  # no target across a border of documents
        assert (window.targets[~real] == -100).all() and not window.start[~real].any()
        assert torch.equal(window.tokens[real], window.ids[real].long() * 100_000 + window.position[real])
        assert torch.equal(window.start, (window.position == 0) & real)
        seen.append(window.tokens[real])
    expected = np.concatenate([d * 100_000 + np.arange(n) for d, n in enumerate(LENGTHS)])
    assert torch.equal(torch.cat(seen).sort().values, torch.from_numpy(expected).sort().values)


@pytest.mark.parametrize("segments", [1, 4, None])
@pytest.mark.parametrize("lanes", [1, 3, 400])
def test_tokens_read_before_each_window(segments, lanes):
    (loader,) = loaders(Memory(LENGTHS), lanes, 1, segments)
    counted = [int((window.ids >= 0).sum()) for window in loader]
    assert loader.plan.read.tolist() == [0, *np.cumsum(counted)]


@pytest.mark.parametrize("segments", [2, None])
def test_a_lane_reads_its_documents_in_order(segments):
    (loader,) = loaders(Memory(LENGTHS), 3, 1, segments)
    for lane in range(3):
        rows = torch.cat([w.tokens[lane].flatten()[w.ids[lane].flatten() >= 0] for w in loader])
        steps = rows.diff()
        assert ((steps == 1) | (rows[1:] % 100_000 == 0)).all()


@pytest.mark.parametrize("segments", [2, None])
def test_ranks_read_what_one_rank_reads(segments):
    documents = Memory(LENGTHS)
    (one,) = loaders(documents, 4, 1, segments)
    two = loaders(documents, 4, 2, segments)
    assert len(one) == len(two[0]) == len(two[1])
    for i in (0, len(one) // 2, len(one) - 1):
        whole, parts = one.window(i), [x.window(i) for x in two]
        for a, b, c in zip(whole[:5], parts[0][:5], parts[1][:5]):
            assert torch.equal(a, torch.cat([b, c]))
        assert whole.normaliser == parts[0].normaliser == parts[1].normaliser


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("segments", [3, None])
def test_normaliser_counts_the_whole_optimizer_step(masked, accumulate, segments):
    (loader,) = loaders(Memory(LENGTHS, masked), 4, 1, segments, accumulate=accumulate)
    windows = list(loader)
    counts = [int((w.targets != -100).sum()) for w in windows]
    for i, window in enumerate(windows):
        first = i - i % accumulate
        assert window.normaliser == max(1, sum(counts[first : first + accumulate]))  # also in a shorter last group


def test_whole_documents_stay_whole():
    (loader,) = loaders(Memory(LENGTHS), 4, 1, None)
    for window in loader:
        for document in set(window.ids.unique().tolist()) - {-1}:
            assert int((window.ids == document).sum()) == LENGTHS[document]


def test_epochs_and_seeds_differ_and_repeat():
    documents = Memory(LENGTHS)
    order = [list(loaders(documents, 4, 1, 2, epoch, seed=seed)[0].plan.documents[0]) for epoch, seed in
             [(0, 1), (0, 1), (1, 1), (0, 2)]]  # fmt: skip
    assert order[0] == order[1] and order[0] != order[2] and order[0] != order[3]


def test_stop_anywhere_and_go_on():
    documents = Memory(LENGTHS)
    whole = list(loaders(documents, 4, 1, 3, epoch=2)[0])
    for stop in (0, 1, len(whole) // 2, len(whole)):
        first = loaders(documents, 4, 1, 3, epoch=2)[0]
        iterator = iter(first)
        done = [next(iterator) for _ in range(stop)]
        second = loaders(documents, 4, 1, 3, epoch=0)[0]
        second.load_state_dict(first.state_dict())
        assert len(second) == len(whole)
        both = done + list(second)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(both, whole, strict=True))


def test_another_plan_is_refused():
    documents = Memory(LENGTHS)
    state = loaders(documents, 4, 1, 3, seed=1)[0].state_dict()
    with pytest.raises(ValueError, match=r"data.seed was 1 in the checkpoint and is 2"):
        loaders(documents, 4, 1, 3, seed=2)[0].load_state_dict(state)


@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_padding_is_below_one_percent(lanes):
    plan = Plan(LENGTHS, lanes, 128, 4, 0, 0)
    real = sum(p.end - p.begin for i in range(len(plan)) for p in plan.pieces(i))
    assert real == LENGTHS.sum()
    assert plan.padding == pytest.approx(1 - real / (lanes * plan.borders[-1]))
    whole = Plan(LENGTHS, lanes, 128, None, 0, 0)
    print(f"{lanes} lanes: padding {plan.padding:.2%} with 4 segments a window, {whole.padding:.2%} with whole ones")
    assert plan.padding < 0.01


@pytest.mark.parametrize(("segments", "horizon"), [(2, None), (4, 3), (4, 1), (None, None), (None, 2)])
def test_share_of_cut_gradients(segments, horizon):
    """Counted token by token: a token is cut if a border lies between it and its document's beginning."""
    plan = Plan(LENGTHS, 3, 16, segments, 0, 0)
    reach, cut = 16 * (horizon or 10**9), 0
    open_at: dict[int, tuple[int, int]] = {}
    for window in range(len(plan)):
        for _, place, document, begin, end in plan.pieces(window):
            if begin == 0:
                open_at[document] = (window, place // reach)
            for offset in range(end - begin):
                cut += (window, (place + offset) // reach) != open_at[document]
    assert plan.cut(horizon) == pytest.approx(cut / LENGTHS.sum())


def test_one_document_is_random_access():
    """A window of a document of a hundred million tokens costs its own size."""
    documents = Memory(np.array([100_000_000]))
    documents.tokens = lambda d, begin, end: np.arange(begin, end)
    (loader,) = loaders(documents, 1, 1, 4, length=512)
    window = loader.window(40_000)
    assert window.tokens.shape == (1, 4, 512) and int(window.tokens[0, 0, 0]) == 40_000 * 2048
