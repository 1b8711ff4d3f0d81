"""One of the ranks of tests/test_scan.py: python scan_ranks.py RANK FOLDER CASES. It saves what came of its cases."""

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from test_bptt import LENGTH, PADDING, SEGMENTS, STARTS, LearntState
from tiny import ARCHS, VOCAB, Carried, make_window, random_state, tiny_model, values
from torch.distributed.device_mesh import DeviceMesh

from infctx.borders import StatesConfig
from infctx.bptt import window_loss
from infctx.parallel import sharded
from infctx.parallel.pieces import cut_model
from infctx.parallel.scan import Scan
from infctx.parallel.sharded import Outline
from infctx.segments import Window

# Segments that no lane has a token in, and lanes with none in a segment between two of a document.
EMPTY = dict(segments=5, starts=((0, 1, 3), (1, 3, 0)), padding=((0, 2, 0), (1, 2, 0), (0, 4, 0), (1, 4, 4)))
UGLY = dict(segments=SEGMENTS, starts=STARTS, padding=PADDING)


RANKS = 4  # processes: as many groups of fewer ranks as there is room for share the cases


class Case(NamedTuple):
    arch: str
    dtype: str = "float64"
    horizon: int | None = None
    kernel: str = "auto"
    window: str = "ugly"  # ugly, odd (a length that no number of ranks divides), empty, thin (one token), or a number
    how: str = "carried"  # carried: goes on from a state; fresh: from none; sharded: that with weights in pieces;
    # validation; kept: few states at borders; autocast
    ranks: int = 2


FEW = ["rwkv4", "rwkv6", "rwkv7"]


def cases_of(chosen: str) -> list[Case]:
    """Args: chosen: some, all, random."""
    if chosen == "random":
        archs = ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a"]
        return [Case(archs[i % 5], horizon=(None, 2)[i % 2], window=str(i), ranks=2 + i % 3) for i in range(150)]
    archs = [arch for arch in ARCHS if arch != "goldfinch"]
    if chosen == "all":
        found = [Case(arch, *x) for arch in archs for x in (("float64", 1), ("float64", 3), ("float32",))]
        found += [Case(arch, "float32", 3, "reference") for arch in archs]
        found += [Case(arch, kernel=kernel) for arch in FEW for kernel in ("reference", "chunked")]
        found += [Case(arch, window="odd", how=how) for arch in FEW for how in ("fresh", "validation", "kept")]
        found += [Case(arch, horizon=horizon, how="sharded") for arch in archs for horizon in (None, 3)]
        return [case._replace(ranks=ranks) for ranks in (2, 4) for case in found]
    found = [Case(arch) for arch in archs]
    found += [Case("rwkv4", horizon=1), Case("rwkv6", horizon=3), Case("rwkv7", horizon=3, kernel="reference")]
    found += [Case(arch, "float32", window="odd") for arch in FEW] + [Case(arch, window="thin") for arch in FEW]
    hows = {"rwkv4": "fresh", "rwkv6": "validation", "rwkv7": "kept"}
    found += [Case(arch, window="empty", how=how) for arch, how in hows.items()]
    found += [Case(arch, "float32", how="autocast") for arch in FEW]
    found += [Case(arch, horizon=3, window="empty", how="sharded") for arch in FEW]
    found += [Case(arch, window="empty", ranks=4) for arch in FEW] + [Case("rwkv7", window="thin", ranks=4)]
    return found + [Case(arch, horizon=3, ranks=1) for arch in FEW]


def random_window(seed: int) -> Window:
    """Lanes in which anything may be anywhere."""
    generator = torch.Generator().manual_seed(seed)
    lanes, segments, length = (int(torch.randint(1, n, (), generator=generator)) for n in (4, 5, 10))
    shape = (lanes, segments, length)
    tokens, targets = (torch.randint(VOCAB, shape, generator=generator) for _ in range(2))
    holes, gaps, starts = (torch.rand(size, generator=generator) for size in (shape, (lanes, segments, 1), shape))
    padding = (holes < 0.2) | (gaps < 0.2)
    targets[padding] = -100
    position = torch.arange(segments * length).view(1, segments, length).expand(shape)
    return Window(tokens, targets, (starts < 0.15) & ~padding, torch.zeros(shape).int() - padding.int(), position)


def window_of(case: Case) -> Window:
    if case.window.isdigit():
        return random_window(int(case.window))
    if case.window == "thin":
        return make_window(2, 3, 1, starts=((1, 1, 0),), padding=((0, 1, 0),))
    layout = EMPTY if case.window == "empty" else UGLY
    return make_window(2, layout["segments"], LENGTH - (case.window == "odd"), layout["starts"], layout["padding"])


def run(case: Case, runner) -> dict:
    model, window = LearntState(tiny_model(case.arch, getattr(torch, case.dtype))), window_of(case)
    model.model.kernel = case.kernel
    carried = Carried(random_state(model.model, len(window.tokens)))
    state = None if case.how == "fresh" else carried.state()
    states = StatesConfig("every-3" if case.how == "kept" else "all")
    with torch.set_grad_enabled(case.how != "validation"), torch.autocast("cpu", enabled=case.how == "autocast"):
        loss, metrics, after = window_loss(model, window, state, case.horizon, states=states, runner=runner)
    whole = [x.detach() for x in values(after)]
    parts = {f"metric {name}": x for name, x in metrics.items()} | {"loss": loss.detach()}
    if case.how == "validation":
        return {"whole": whole, "parts": parts, "gradients": {}}
    names, learnt = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    if state is not None:
        learnt = [*learnt, carried.sources[0]]
    grads = list(torch.autograd.grad(loss, learnt))
    if state is not None:
        whole.append(grads.pop())
    return {"whole": whole, "parts": parts, "gradients": dict(zip(names, grads))}


class Engine:
    """FSDP2 without more: see `sharded.Engine`."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def forward(self, part, *args):
        return part(*args)

    def backward_segment(self, total) -> None:
        total.backward()

    def last(self) -> None:
        pass


def run_sharded(case: Case, group, note) -> dict:
    """As `run`, of a model that the ranks of a group have in pieces; alone without a group."""
    model, window = tiny_model(case.arch, getattr(torch, case.dtype)), window_of(case)
    seen, runner, ranks = model, None, 1
    if group is not None:
        seen, ranks = Outline(model, torch.device("cpu")), case.ranks
        cut_model(model, DeviceMesh.from_group(group, "cpu"), None)
        runner = note(Scan(group, sharded.runner(Engine(ranks))))
    loss, metrics, after = window_loss(seen, window, None, case.horizon, runner=runner)
    (loss * ranks).backward()
    parts = {f"metric {name}": x for name, x in metrics.items()} | {"loss": loss.detach()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: x.full_tensor() if group is not None else x for name, x in grads.items()}
    return {"whole": [x.detach() for x in values(after)], "parts": parts,
            "gradients": {name: x / ranks for name, x in whole.items()}}  # fmt: skip


def refusal(scan: Scan) -> str:
    try:
        run(Case("goldfinch"), scan)
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    rank, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), cases_of(sys.argv[3])
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/ranks", wait, RANKS, rank)
    groups = {n: dist.new_subgroups(n, timeout=wait)[0] for n in (1, 2, 4)}
    groups[3] = dist.new_group([0, 1, 2], timeout=wait)
    ours, alone, messages = {}, {}, {}
    for i, case in enumerate(cases):
        if rank // case.ranks == i % (RANKS // case.ranks):
            listen = partial(note, messages.setdefault(i, []))
            group = groups[case.ranks]
            ours[i] = run_sharded(case, group, listen) if case.how == "sharded" else run(case, listen(Scan(group)))
        if i % RANKS == rank:
            alone[i] = run_sharded(case, None, None) if case.how == "sharded" else run(case, None)
    saved = {"ours": ours, "alone": alone, "messages": messages, "refusal": refusal(Scan())}
    torch.save(saved, folder / f"{rank}.pt")
    dist.destroy_process_group()


def note(messages: list, scan: Scan) -> Scan:
    """Keep the shapes of every message, in order."""
    gather = scan.line.gather
    scan.line.gather = lambda *parts: messages.append([list(x.shape) for x in parts]) or gather(*parts)
    return scan


if __name__ == "__main__":
    main()
