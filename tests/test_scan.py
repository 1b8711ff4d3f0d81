"""The scan schedule: segments split over ranks give the loss, the states and the gradients of one rank."""

import pytest
import torch
from ranks import run_ranks
from scan_ranks import RANKS, cases_of
from tiny import Carried, random_state, relative, tiny_model, worst

from infctx.state import pack

# Of all gradients as one vector, and of each: the decay of a preview sums up what cancels over the channels of a head.
BOUNDS = {"float64": (1e-12, 1e-11), "float32": (1e-5, 1e-2)}


def results_of(folder, chosen, limit):
    run_ranks("scan_ranks.py", RANKS, folder, folder, chosen, timeout=limit)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def summed(results, kind):
    """What is a part on each rank."""
    return {name: sum(x[kind][name] for x in results) for name in results[0][kind]}


def errors(ours, alone):
    """Of what is whole on every rank, of sums over ranks, of all gradients together, and of each."""
    whole = max(worst(x["whole"], alone["whole"]) for x in ours)
    parts = summed(ours, "parts")
    found = [whole, worst(parts.values(), [alone["parts"][name] for name in parts])]
    if alone["gradients"]:
        gradients, expected = summed(ours, "gradients"), alone["gradients"]
        pairs = [(gradients[name], x) for name, x in expected.items()]
        together = relative(*(torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1)))
        found += [together, max(worst([a], [b]) for a, b in pairs)]
    return found


def check(case, ours, alone):
    """A case on all ranks of a group against one rank."""
    assert len(ours) == case.ranks
    found = errors(ours, alone)
    if case.how == "autocast":
        assert max(found[:3]) < 0.02, (case, found)
        return
    tight, loose = BOUNDS[case.dtype]
    assert max(found[:3]) < tight and max(found) < loose, (case, found)
    for x in ours[1:]:  # what is whole is the same to the last bit
        assert all(map(torch.equal, x["whole"], ours[0]["whole"])), case


@pytest.mark.parametrize("chosen", ["some", *(pytest.param(x, marks=pytest.mark.slow) for x in ("all", "random"))])
def test_ranks_equal_one(tmp_path, chosen):
    """Groups of 1, 2, 3 and 4 ranks. Random layouts have tokens, borders and padding anywhere: nothing may hang."""
    ranks = results_of(tmp_path, chosen, 300 if chosen == "some" else 900)
    alone = {i: x for rank in ranks for i, x in rank["alone"].items()}
    for i, case in enumerate(cases_of(chosen)):
        members = [rank for rank in ranks if i in rank["ours"]]
        check(case, [x["ours"][i] for x in members], alone[i])
        messages = [x["messages"][i] for x in members]
        assert messages[0] and all(x == messages[0] for x in messages)  # in step: so weights may be sharded
    assert all("choose wavefront" in x["refusal"] for x in ranks)


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a"])
def test_no_tokens_add_nothing(arch):
    """A rank may have none: states pass, and no gradient of a weight is whatever memory held before."""
    model = tiny_model(arch)
    carried = Carried(random_state(model, 3))
    learnt = [p for p in model.parameters() if p.requires_grad]
    for _ in range(5):
        poison = [torch.full((n,), 1e30, dtype=torch.float64) for n in (16, 32, 64, 96, 192, 512, 1024) * 4]
        del poison
        x, after = model.features(torch.zeros(1, 0).long(), carried.state(), torch.zeros(4, dtype=torch.int32))
        results, seeds = [x, pack(after)], [torch.zeros_like(x), torch.ones_like(pack(after))]
        first, *grads = torch.autograd.grad(results, [*carried.sources, *learnt], seeds, materialize_grads=True)
        assert torch.equal(pack(after), carried.sources[0]) and not any(g.any() for g in grads)
        assert (first == 1).all() or arch == "rwkv4"  # whose exponents have no gradient
