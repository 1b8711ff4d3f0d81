"""Laws 5 and 7: the gradient of a window is that of plain autograd, wherever it is cut, and costs one segment."""

import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHS, VOCAB, Carried, detached, law, make_window, random_state, tiny_model, values, worst
from torch import nn

import infctx
from infctx.borders import StatesConfig
from infctx.bptt import window_loss
from infctx.segments import Window, sequences
from infctx.state import pack, unpack
from infctx.task import DISTANCES, by_distance

# Two lanes: one goes on from a carried state and changes document in mid-segment, twice in one segment, and has cuts at
# odd places (padding in the middle of a lane); the other starts afresh and ends with a segment of one token.
STARTS = ((0, 1, 5), (0, 4, 2), (0, 4, 9), (0, 6, 0), (1, 0, 0), (1, 3, 7))
PADDING = ((0, 2, 11), (1, 1, 3), (1, 5, 1), (1, 7, 1), (0, 7, 9))
SEGMENTS, LENGTH = 8, 12


class LearntState(nn.Module):
    """A model that learns the state of a document's beginning."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, model.head
        self.initial = nn.Parameter(pack(random_state(model, 1, seed=9)))
        self.features = model.features

    def initial_state(self, n):
        return unpack(self.initial.expand(n, -1), self.model.initial_state(1), self.model.initial_state(n).memory)


def plain(model, window, carried, horizon=None, borders=None):
    """One pass of autograd over the window, document by document, with detach at the horizon's borders.

    borders: a list that gets the lanes' states before each segment.
    """
    total, tokens = 0.0, 0
    states = [carried.row(i) for i in range(len(window.tokens))]
    for segment in range(window.tokens.shape[1]):
        if borders is not None:
            borders.append([x for state in states for block in state.blocks for x in block if x.numel()])
        for lane in range(len(states)):
            if horizon and segment and segment % horizon == 0:
                states[lane] = detached(states[lane])
            for t in range(window.tokens.shape[2]):
                at = (lane, segment, t)
                if window.ids[at] < 0:
                    continue
                if window.start[at]:
                    states[lane] = model.initial_state(1)
                x, states[lane] = model.features(window.tokens[at].view(1, 1), states[lane])
                if window.targets[at] != -100:
                    total = total + F.cross_entropy(model.head(x[0]), window.targets[at].view(1))
                    tokens += 1
    return total / tokens, states


def case(arch, dtype=torch.float64):
    model = LearntState(tiny_model(arch, dtype))
    window = make_window(2, SEGMENTS, LENGTH, STARTS, PADDING)
    return model, window, Carried(random_state(model.model, 2))


def sources(model, carried):
    return [*carried.sources, *(p for p in model.parameters() if p.requires_grad)]


def gradient(model, window, carried, horizon):
    loss, metrics, state = window_loss(model, window, carried.state(), horizon)
    return [loss, *torch.autograd.grad(loss, sources(model, carried))], metrics, state


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("horizon", [None, 1, 2, 3, 8, 100])
def test_window_equals_autograd(arch, horizon, record_property):
    model, window, carried = case(arch)
    ours, metrics, state = gradient(model, window, carried, horizon)
    loss, states = plain(model, window, carried, horizon)
    expected = torch.autograd.grad(loss, sources(model, carried))
    law(record_property, 5, arch, worst(ours, [loss, *expected]), 1e-10)
    theirs = [torch.cat(parts) for parts in zip(*(values(s) for s in states))]
    assert worst(values(state), theirs) < 1e-12
    assert int(metrics["tokens"]) == int((window.targets != -100).sum())
    assert float(metrics["loss_sum"] / metrics["tokens"]) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("horizon", [None, 1, 5])
@pytest.mark.parametrize("keep", ["every-1", "every-3", "every-100"])
def test_states_computed_again_change_nothing(arch, horizon, keep):
    model, window, carried = case(arch)
    ours, metrics, state = gradient(model, window, carried, horizon)
    config = StatesConfig(keep, "cpu")
    loss, metrics_again, state_again = window_loss(model, window, carried.state(), horizon, states=config)
    again = [loss, *torch.autograd.grad(loss, sources(model, carried))]
    assert all(map(torch.equal, ours, again)) and all(map(torch.equal, values(state), values(state_again)))
    assert all(torch.equal(metrics[name], x) for name, x in metrics_again.items())


@pytest.mark.parametrize("keep", ["some", "every-0", "every-x", "16"])
def test_which_states_are_kept_is_checked(keep):
    with pytest.raises(ValueError, match=r"states\.keep must be all or every-N"):
        StatesConfig(keep)


@pytest.mark.parametrize("arch", ARCHS)
def test_horizons_differ(arch):
    """A test of truncation that could not fail would prove nothing."""
    model, window, carried = case(arch)
    exact, short = (gradient(model, window, carried, horizon)[0] for horizon in (None, 1))
    assert worst(short, exact) > 1e-2
    assert not torch.equal(exact[2], torch.zeros_like(exact[2]))


def test_metrics_by_segment_position_and_source():
    model, window, flat = case("rwkv7")
    _, metrics, _ = gradient(model, window, flat, None)
    assert metrics["segment_loss"].sum() == pytest.approx(float(metrics["loss_sum"]))
    assert metrics["position_loss"].sum() == pytest.approx(float(metrics["loss_sum"]))
    learnt = window.targets != -100
    buckets = torch.bincount((window.position[learnt] + 1).float().log2().floor().long(), minlength=40)
    assert metrics["position_tokens"].tolist() == buckets.tolist()
    by_source = torch.bincount(window.sources.of[window.ids[learnt]], minlength=3)
    assert metrics["source_tokens"].tolist() == by_source.tolist() and by_source[0] and by_source[2]
    assert metrics["source_loss"].sum() == pytest.approx(float(metrics["loss_sum"]))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("horizon", [None, 1, 3])
def test_gradient_at_borders_equals_autograd(arch, horizon):
    """Of what segment s hands to the one before; nothing where the horizon cuts, and at the window's beginning."""
    model, window, carried = case(arch)
    metrics, borders = gradient(model, window, carried, horizon)[1], []
    loss, _ = plain(model, window, carried, horizon, borders)
    inner, expected = [x for states in borders[1:] for x in states], [0.0]
    grads = iter(torch.autograd.grad(loss, inner, allow_unused=True, materialize_grads=True))
    expected += [sum(float(next(grads).square().sum()) for _ in states) for states in borders[1:]]
    assert sum(x > 0 for x in expected) == {None: SEGMENTS - 1, 1: 0, 3: 5}[horizon]
    ours = metrics["border_gradient"].sqrt()
    assert worst([*ours], [*torch.tensor(expected, dtype=torch.float64).sqrt()]) < 1e-10


def test_borders_in_a_line_of_figures():
    """By distance from the window's end, two in an octave, however long it is."""
    for segments in (1, 2, 9, 10_000):
        far = by_distance(torch.arange(segments).double())  # border s is segments - s before the end
        found = {d: segments - int(x) for d, x in zip(DISTANCES, far) if x}
        assert found == {d: d for d in DISTANCES if d < segments} and len(far) == len(DISTANCES) < 64
    assert DISTANCES[:9] == (1, 2, 3, 4, 6, 8, 12, 16, 24)


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv7", "goldfinch"])
def test_lanes_carry_on_between_windows(arch):
    """Two windows of four segments are the eight of one, with the gradient cut between."""
    model, window, flat = case(arch)
    halves = [Window(*(x[:, i : i + 4] for x in window[:5])) for i in (0, 4)]
    total, state = 0.0, flat.state()
    for half in halves:
        loss, metrics, state = window_loss(model, half, state, normaliser=1)
        total = total + loss
        assert not any(x.requires_grad for block in state.blocks for x in block)
    tokens = (window.targets != -100).sum()
    learnt = [p for p in model.parameters() if p.requires_grad]
    expected = gradient(model, window, flat, 4)[0]
    ours = torch.autograd.grad(total / tokens, learnt)
    assert worst([total / tokens, *ours], [expected[0], *expected[-len(learnt) :]]) < 1e-10


@pytest.mark.parametrize("arch", ["rwkv7", "goldfinch"])
def test_accumulation_and_layout_do_not_matter(arch):
    """Law 7: the same documents as 4 lanes, 2 x 2 or 4 x 1 give one gradient."""
    model = tiny_model(arch)
    window = make_window(4, 3, 10, starts=tuple((i, 0, 0) for i in range(4)), padding=((1, 2, 4), (3, 1, 1), (3, 2, 0)))
    tokens = int((window.targets != -100).sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for size in (4, 2, 1):
        parts = [Window(*(x[i : i + size] for x in window[:5])) for i in range(0, 4, size)]
        total = sum(window_loss(model, part, None, normaliser=tokens, l2_penalty=1e-2)[0] for part in parts)
        results.append([total, *torch.autograd.grad(total, parameters)])
    assert worst(results[1], results[0]) < 1e-12
    assert worst(results[2], results[0]) < 1e-12


def test_nothing_to_learn_is_exactly_zero():
    model, window, flat = case("rwkv7")
    window.targets.fill_(-100)
    (loss, *grads), metrics, _ = gradient(model, window, flat, None)
    assert loss == 0 and metrics["tokens"] == 0
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("arch", ["rwkv7", "goldfinch"])
def test_forward_only_gives_the_same_loss(arch):
    model, window, flat = case(arch)
    (loss, *_), _, state = gradient(model, window, flat, None)
    with torch.no_grad():
        again, _, carried = window_loss(model, window, flat.state())
    assert float(again) == pytest.approx(float(loss), rel=1e-12)
    assert worst(values(carried), values(state)) < 1e-12


def test_dropout_is_the_same_in_both_passes():
    """With masks that depended on the pass, the gradient of the state would be that of another function."""

    class Dropped(LearntState):
        def __init__(self, model):
            super().__init__(model)
            self.dropout = nn.Dropout(0.5)
            self.features = self._features

        def _features(self, *args):
            x, state = self.model.features(*args)
            drop = self.dropout(torch.ones_like(pack(state)))
            return self.dropout(x), unpack(pack(state) * drop, self.model.initial_state(1))

    model, window = Dropped(tiny_model()), make_window(2, 4, 6)
    flat = pack(random_state(model.model, 2)).requires_grad_()

    def loss(x):
        torch.manual_seed(5)
        return window_loss(model, window, unpack(x, model.model.initial_state(1)))[0]

    (g,) = torch.autograd.grad(loss(flat), [flat])
    direction = torch.randn_like(flat)
    step = 1e-6 * direction
    numeric = (loss(flat + step) - loss(flat - step)) / 2e-6
    assert float((g * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)


@pytest.mark.parametrize("arch", ["rwkv7", "goldfinch"])
def test_bfloat16_autocast_keeps_the_gradient(arch):
    """Casts cached without a graph in the first pass would leave weights without a gradient."""
    model, window, flat = case(arch, torch.float32)
    exact = gradient(model, window, flat, None)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = gradient(model, window, flat, None)[0]
        loss, _ = plain(model, window, flat)
        autograd = [loss, *torch.autograd.grad(loss, sources(model, flat))]
    ours, theirs = ([worst([x], [y]) for x, y in zip(one, exact)] for one in (low, autograd))
    assert all(a < 2 * b + 0.02 for a, b in zip(ours, theirs)), list(zip(ours, theirs))


def test_gradient_can_be_taken_once():
    model, window, flat = case("rwkv7")
    loss, _, _ = window_loss(model, window, flat.state())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_horizon_must_be_positive():
    model, window, flat = case("rwkv7")
    with pytest.raises(ValueError, match="horizon"):
        window_loss(model, window, None, 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_official_initial_values_have_a_gradient(arch):
    """They are full of zeros, where norms have no slope: all gradients are finite, and the head learns."""
    model = infctx.init_model(infctx.ModelConfig(arch, 2, 32, VOCAB, 16))
    loss, _, _ = window_loss(model, make_window(2, 3, 10, STARTS[:0]), None)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters()) and model.head.weight.grad.any()


def test_layout_covers_each_token_once():
    window = make_window(2, SEGMENTS, LENGTH, STARTS, PADDING)
    real = window.ids >= 0
    for segment in range(SEGMENTS):
        s = sequences(window, segment)
        assert torch.equal(s.tokens[0], window.tokens[:, segment][real[:, segment]])
        assert torch.equal(s.targets, window.targets[:, segment][real[:, segment]])
