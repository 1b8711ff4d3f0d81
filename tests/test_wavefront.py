"""A window over R ranks gives what it gives on one: states, losses and their gradients to the bit."""

from collections import Counter, defaultdict

import pytest
import torch
from ranks import run_ranks
from tiny import relative
from wavefront_ranks import SEGMENTS, WINDOWS, Case, cases

from infctx.borders import StatesConfig

RANKS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RANKS)
def ranks(request, tmp_path_factory):
    """What each rank got in each case, and what one rank gets alone."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_ranks("wavefront_ranks.py", size, folder, size, folder, timeout=400)
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    alone = {i: x for one in saved for i, x in one["alone"].items()}
    results = [(case, [x["ours"][i] for x in saved], alone[i]) for i, case in enumerate(cases(size))]
    return size, results, saved[0]["lost"]


def test_states_and_losses_are_those_of_one_rank(ranks):
    for case, ours, alone in ranks[1]:
        parts = {name: sum(x["metrics"][name] for x in ours) for name in alone["metrics"]}
        assert torch.equal(parts["segment_loss"], alone["metrics"]["segment_loss"]), case
        for name in ("tokens", "position_tokens"):
            assert torch.equal(parts[name], alone["metrics"][name]), case
        assert relative(parts["position_loss"], alone["metrics"]["position_loss"]) < 1e-13, case
        # A rank measures layer by layer what one rank measures at once.
        borders = parts["border_gradient"], alone["metrics"]["border_gradient"]
        assert relative(*borders) < (1e-12 if case.dtype == "float64" else 1e-5), case
        passes = case.how != "validation" and case.horizon != 1 and case.window == "ugly"
        assert bool(borders[0].any()) or not passes, case
        loss, bound = sum(x["loss"] for x in ours), 1e-13 if case.dtype == "float64" else 1e-6
        assert abs(loss - alone["loss"]) <= bound * abs(alone["loss"]), case
        for x in ours:
            assert torch.equal(x["state"], alone["state"]), case
            assert all(map(torch.equal, x["keys"] or [], alone["keys"] or [])), case
            assert (x["keys"] is None) == (case.arch != "goldfinch"), case


def test_gradient_of_the_carried_state_is_that_of_one_rank(ranks):
    compared = 0
    for case, ours, alone in ranks[1]:
        for name in {"carried", "carried_keys"} & alone.keys():
            compared += 1
            assert alone[name].any() or case.window == "silent", case
            for x in ours:
                if case.arch != "goldfinch":
                    assert torch.equal(x[name], alone[name]), case
                else:  # of keys, contributions of three segments and more are summed in another order
                    bound = 1e-12 if case.dtype == "float64" else 1e-6
                    assert relative(x[name], alone[name]) < bound, (case, name)
    assert compared > 5


def test_parameter_gradients_are_parts_of_those_of_one_rank(ranks, record_property):
    worst = defaultdict(float)
    for case, ours, alone in ranks[1]:
        if "parameters" not in alone:
            continue
        assert not any(torch.isnan(g).any() for x in ours for g in x["parameters"].values()), case
        flat = torch.cat([g.double().flatten() for g in alone["parameters"].values()])
        parts = [torch.cat([g.double().flatten() for g in x["parameters"].values()]) for x in ours]
        bound = 1e-13 if case.dtype == "float64" else 1e-6
        if case.window == "silent":
            assert not flat.any() and not any(part.any() for part in parts)
            continue
        error = relative(sum(parts), flat)
        assert error <= bound, (case, error)
        worst[case.arch, case.dtype] = max(worst[case.arch, case.dtype], error)
        for name, g in alone["parameters"].items():
            own = [x["parameters"][name].double() for x in ours]
            # Where the parts nearly cancel out, what is left of them is rounding.
            scale = sum(x.norm() for x in own)
            assert (sum(own) - g.double()).norm() <= bound * scale, (case, name)
            assert name != "initial" or case.how != "fresh" or g.norm() > 1e-6, case
    for (arch, dtype), error in worst.items():
        record_property("wavefront", f"{ranks[0]} {arch} {dtype} {error:.3e}")


def test_layers_go_on_one_by_one(ranks):
    """On the way back a layer's gradient is sent on before that of the layer below is waited for."""
    size, results, _ = ranks
    if size == 1:
        pytest.skip("a rank alone sends nothing")
    case, ours, _ = next(x for x in results if x[0] == Case("rwkv7"))
    for rank, x in enumerate(ours):
        events = [e for e in x["events"] if e[0] == "backwards"]
        own = [s for s in range(SEGMENTS) if s % size == rank]
        expected = []
        for s in reversed(own):
            for layer in (1, 0):
                if s < SEGMENTS - 1:
                    expected.append(("backwards", "receive", s + 1, layer))
                if s:
                    expected.append(("backwards", "send", s, layer))
        assert events == expected
        events, expected = [e for e in x["events"] if e[0] in ("onwards", "beyond")], []
        for s in own:
            for layer in (0, 1):
                if s:
                    expected.append(("onwards", "receive", s, layer))
                if s < SEGMENTS - 1:
                    expected.append(("onwards", "send", s + 1, layer))
        assert events == expected


def test_messages_are_taken_in_the_order_they_are_sent(ranks):
    """Not every backend has tags."""
    size, results, _ = ranks
    for case, ours, _ in results:
        sent, taken = defaultdict(list), defaultdict(list)
        for x in ours:
            for way, what, border, tag in x["events"]:
                if what in ("send", "receive"):
                    (sent if what == "send" else taken)[way, border % size].append((border, tag))
        assert sent == taken and (sent or case.window == "short"), case


def test_a_rank_keeps_its_own_borders(ranks):
    size, results, _ = ranks
    for case, ours, _ in results:
        segments = WINDOWS[case.window]["segments"]
        for rank, x in enumerate(ours):
            kept = [(room, segment) for what, room, segment, _ in x["events"] if what == "keep"]
            assert all(segment % size == rank for _, segment in kept), case
            if case.keep == "all":
                assert all(room == -(-min(segments, case.horizon or segments) // size) for room, _ in kept), case


def test_a_rank_that_ended_is_named(ranks):
    if ranks[0] == 2:
        assert "rank 1 sent nothing across the border before segment 2" in ranks[2]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 64])
def test_kept_states_are_on_all_ranks(size):
    length = StatesConfig("every-16").block(4096, size)
    kept = Counter(segment % size for segment in range(0, 4096, length))
    assert 16 <= length < 20 and len(kept) == size and max(kept.values()) - min(kept.values()) <= 1
