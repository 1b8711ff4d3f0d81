"""One rank of tests/test_wavefront.py, which runs every case: python wavefront_ranks.py RANK RANKS FOLDER."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from test_bptt import LENGTH, PADDING, SEGMENTS, STARTS, LearntState
from tiny import ARCHS, Carried, make_window, random_state, tiny_model
from torch import nn

from infctx.borders import StatesConfig
from infctx.bptt import window_loss
from infctx.parallel.wavefront import Kept, Wavefront
from infctx.state import pack

# A document goes on over a segment that no lane has a token in, another begins behind it, and the window ends in one.
EMPTY = dict(starts=((0, 1, 3), (1, 3, 0)), padding=((0, 2, 0), (1, 2, 0), (0, 5, 0), (1, 5, 0), (1, 4, 4)))
WINDOWS = {
    "ugly": dict(segments=SEGMENTS, starts=STARTS, padding=PADDING),
    "empty": dict(segments=6, **EMPTY),
    "short": dict(segments=1, starts=((0, 0, 4),)),
    "silent": dict(segments=3),
}


class Case(NamedTuple):
    arch: str
    dtype: str = "float64"
    horizon: int | None = None
    keep: str = "all"
    window: str = "ugly"
    how: str = "carried"  # carried: goes on from a state; fresh: from none; validation; autocast; dropout


def cases(ranks: int) -> list[Case]:
    some = ["goldfinch", "rwkv4", "rwkv7"]
    archs = ARCHS if ranks == 2 else some
    found = [Case(arch, *x) for arch in archs for x in (("float64",), ("float64", 3, "every-2"), ("float32", 1))]
    if ranks == 1:  # the same code without a message
        return [*found, Case("goldfinch", how="validation"), Case("goldfinch", how="fresh", window="empty")]
    for arch in some:
        found += [Case(arch, "float32", *x) for x in ((None, "every-3"), (None, "all"), (3, "all"))]
        found += [Case(arch, "float64", 1, "every-3"), Case(arch, "float64", None, "every-3")]
        found += [Case(arch, window=window, horizon=horizon) for window in ("empty", "short") for horizon in (None, 2)]
        found += [Case(arch, window="empty", keep="every-2"), Case(arch, window="silent")]
        found += [
            Case(arch, how="fresh"),
            Case(arch, how="fresh", window="empty", horizon=1),
            Case(arch, how="validation"),
        ]
        found += [Case(arch, how="validation", window="empty"), Case(arch, "float32", 3, how="autocast")]
        found += [Case(arch, how="dropout")]
    return found


class Dropped(LearntState):
    """Draws random numbers in the forward."""

    def __init__(self, model):
        super().__init__(model)
        self.dropout = nn.Dropout(0.5)
        self.features = self._features

    def _features(self, *args, **options):
        x, state = self.model.features(*args, **options)
        return self.dropout(x), state


def run(case: Case, runner) -> dict:
    dtype = getattr(torch, case.dtype)
    model = (Dropped if case.how == "dropout" else LearntState)(tiny_model(case.arch, dtype))
    layout = WINDOWS[case.window]
    window = make_window(2, layout["segments"], LENGTH, layout.get("starts", ()), layout.get("padding", ()))
    if case.window == "silent":
        window.targets.fill_(-100)
    carried = Carried(random_state(model.model, 2))
    state = None if case.how == "fresh" else carried.state()
    options = dict(horizon=case.horizon, states=StatesConfig(case.keep), runner=runner)
    with torch.set_grad_enabled(case.how != "validation"), torch.autocast("cpu", enabled=case.how == "autocast"):
        loss, metrics, after = window_loss(model, window, state, **options)
    found = dict(loss=loss.detach(), metrics=metrics, state=pack(after).detach(), keys=None)
    if after.memory is not None:
        found["keys"] = [x.detach() for x in after.memory[:3]]
    if case.how == "validation":
        return found
    names, learnt = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    if state is None:
        grads = torch.autograd.grad(loss, learnt)
    else:
        found["carried"], *grads = torch.autograd.grad(loss, [carried.sources[0], *carried.sources[1:], *learnt])
        if after.memory is not None:
            found["carried_keys"], *grads = grads
    found["parameters"] = dict(zip(names, grads))
    return found


def record(wavefront: Wavefront, events: list) -> None:
    """Note in order every message of a rank, and every segment that it keeps the state before."""
    ring = wavefront.ring
    send, receive = ring.send, ring.receive

    def sending(way, border, tag, x):
        events.append((way, "send", border, tag))
        send(way, border, tag, x)

    def receiving(way, border, tag, shape, like):
        x = receive(way, border, tag, shape, like)
        events.append((way, "receive", border, tag))
        return x

    def keeping(kept, segment, lanes):
        events.append(("keep", len(kept.rows.rows), segment, 0))
        put(kept, segment, lanes)

    put, Kept.put, ring.send, ring.receive = Kept.put, keeping, sending, receiving


def as_nccl(folder: Path, ranks: int) -> None:
    """The first message between two ranks on a communicator waits for both of them; gloo's does not."""
    store, met = dist.FileStore(f"{folder}/met", ranks), set()
    send, isend, receive = dist.send, dist.isend, dist.recv

    def meet(group, a: int, b: int) -> None:
        pair = (group.group_name, min(a, b), max(a, b))
        if pair not in met:
            met.add(pair)
            store.set(f"{pair} {dist.get_rank()}", "")
            store.wait([f"{pair} {a}", f"{pair} {b}"], timedelta(seconds=20))

    def sending(x, peer, group):
        meet(group, dist.get_rank(), peer)
        send(x, peer, group=group)

    def sending_on(x, peer, group, tag):
        assert (group.group_name, *sorted((dist.get_rank(), peer))) in met, "this would wait"
        return isend(x, peer, group=group, tag=tag)

    def receiving(x, peer, group, tag=0):
        meet(group, dist.get_rank(), peer)
        return receive(x, peer, group=group, tag=tag)

    dist.send, dist.isend, dist.recv = sending, sending_on, receiving


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/ranks", wait, ranks, rank)
    as_nccl(folder, ranks)
    wavefront, ours, alone, events = Wavefront(timeout=wait), [], {}, []
    record(wavefront, events)
    for i, case in enumerate(cases(ranks)):
        torch.manual_seed(5 + rank)
        first = len(events)
        ours.append(run(case, wavefront) | {"events": events[first:]})
        if i % ranks == rank:
            torch.manual_seed(5)
            alone[i] = run(case, None)
    lost = None
    if ranks == 2 and rank == 0:  # the other one has ended
        with pytest.raises(RuntimeError) as e:
            wavefront.ring.receive("onwards", 2, 0, (1,), torch.zeros(1))
        lost = str(e.value)
    torch.save({"ours": ours, "alone": alone, "lost": lost}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
