"""One document over ranks as a wavefront: measured beside one rank, and simulated for more ranks than this machine has.

    python benchmarks/wavefront.py [--ranks 2] [--rounds 5] [--out benchmarks/results]

Each rank is a process with one thread. In every round one rank makes the gradient of the whole document alone, and all
ranks make it together, in shuffled order; the ratio is that of the medians. The simulation goes through the same order
of work with the times of a segment's parts that were measured here (or given, in milliseconds), and says what share of
the time a rank waits, and the bytes a second that must go from a rank to the next so that states arrive in the time in
which a layer runs. `limit` is the share of the same schedule when all that a layer does takes the same time.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import record
import torch
import torch.distributed as dist
from rounds import interleaved

import infctx
from infctx.bptt import window_loss
from infctx.loss import token_losses
from infctx.parallel.wavefront import Wavefront
from infctx.segments import Window
from infctx.state import pack


class Times(NamedTuple):
    """Seconds of the parts of a segment on one rank."""

    forward: float  # a layer, without a graph
    again: float  # a layer, with one
    backward: float  # a layer
    head: float  # projection and loss, with their gradients


class Outcome(NamedTuple):
    """What a simulated gradient takes."""

    seconds: float
    waiting: float  # share of the ranks' time
    limit: float


def simulate(times: Times, layers: int, segments: int, ranks: int, wire: float = 0.0) -> Outcome:
    """Go through the schedule of `parallel.wavefront`. Args: wire: seconds that a layer's states are on the way."""
    clock, wire = [0.0] * ranks, wire if ranks > 1 else 0.0

    def run(segment: int, seconds: float, waits: list[float] | None, layer: int) -> float:
        rank = segment % ranks
        clock[rank] = max(clock[rank], waits[layer] if waits else 0.0) + seconds
        return clock[rank] + wire

    states: list[float] | None = None  # when the layers' states arrive at the next segment
    for segment in range(segments - 1):
        states = [run(segment, times.forward, states, layer) for layer in range(layers)]
    gradients: list[float] | None = None
    for segment in reversed(range(segments)):
        for layer in range(layers):
            run(segment, times.again, states, layer)
        run(segment, times.head, None, 0)
        states, later = None, [0.0] * layers
        for layer in reversed(range(layers)):
            later[layer] = run(segment, times.backward, gradients, layer)
        gradients = later
    work = segments * (layers * (times.forward + times.again + times.backward) + times.head) - layers * times.forward
    wait = ranks - 1
    return Outcome(max(clock), 1 - work / ranks / max(clock), wait / (segments / ranks * layers + wait))


def document(options: argparse.Namespace) -> tuple[infctx.models.rwkv.RWKV, Window]:
    """The model, and one document of random tokens in segments."""
    config = infctx.ModelConfig(options.arch, options.layers, options.width, options.vocab, 64)
    model = infctx.init_model(config, kernel="cpu")
    shape = (1, options.tokens // options.segment, options.segment)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(1, options.vocab, shape, generator=generator) for _ in range(2))
    start, ids = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int32)
    start[0, 0, 0] = True
    return model, Window(tokens, targets, start, ids)


def rank_main(options: argparse.Namespace) -> None:
    """One rank: the first one prints the seconds of all rounds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{options.meet}", rank=options.rank, world_size=options.ranks)
    model, window = document(options)
    wavefront = Wavefront()
    random.seed(0)  # the same order on all ranks

    def alone() -> None:
        if options.rank == 0:
            window_loss(model, window, None)
        dist.barrier()

    def together() -> None:
        window_loss(model, window, None, runner=wavefront)
        dist.barrier()

    seconds = interleaved({"alone": alone, "together": together}, options.rounds + 1, "cpu")
    if options.rank == 0:
        print(json.dumps({name: x[1:] for name, x in seconds.items()}))


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the document on one rank and on all of them, in each round."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--meet", f"{folder}/ranks", "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE)
            for rank in range(options.ranks)
        ]
        try:
            printed = [rank.communicate()[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed: see above")
    return json.loads(printed[0])


def median(thing: Callable[[], object], times: int = 5) -> float:
    """Of its seconds, after a first time that is not counted."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        thing()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def parts(options: argparse.Namespace) -> Times:
    """Measure the parts of a segment, with one thread."""
    torch.set_num_threads(1)
    model, window = document(options)
    tokens, targets = window.tokens[0, :1], window.targets[0, 0]
    with torch.no_grad():
        forward = median(lambda: model.features(tokens))
    again = median(lambda: model.features(tokens))
    x = model.features(tokens)[0].squeeze(0)
    head = median(lambda: token_losses(x, model.head.weight, targets))
    dx, learnt = torch.ones_like(x), [p for p in model.parameters() if p.requires_grad and p is not model.head.weight]

    def backward() -> None:
        torch.autograd.grad(x, learnt, dx, retain_graph=True)

    return Times(forward / options.layers, again / options.layers, median(backward) / options.layers, head)


def main() -> None:
    """Measure, simulate, print tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"ranks": 2, "rounds": 5, "tokens": 1 << 16, "segment": 1024, "layers": 6, "width": 256, "vocab": 257}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--arch", default="rwkv7")
    parser.add_argument("--times", type=float, nargs=4, metavar=Times._fields, help="milliseconds instead of measured")
    parser.add_argument("--bandwidth", type=float, help="bytes a second between ranks; default: no time at all")
    parser.add_argument("--simulated", type=int, nargs=2, default=[8, 64], help="ranks")
    parser.add_argument("--simulated_layers", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--simulated_tokens", type=int, default=1 << 20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options)
        return
    times = Times(*(x / 1000 for x in options.times)) if options.times else parts(options)
    seconds = measure(options)
    report(options, times, {name: statistics.median(x) for name, x in seconds.items()}, seconds)


def report(options: argparse.Namespace, times: Times, found: dict[str, float], seconds: dict[str, list[float]]) -> None:
    """Print both tables and write them."""
    ratio, segments = found["alone"] / found["together"], options.tokens // options.segment
    foretold = [simulate(times, options.layers, segments, ranks).seconds for ranks in (1, options.ranks)]
    lines = [
        f"{options.tokens:,} tokens, {options.layers} layers of width {options.width}, segments of {options.segment}: "
        f"{found['alone']:.2f} s on one rank, {found['together']:.2f} s on {options.ranks}: {ratio:.2f} times as fast "
        f"(simulated: {foretold[0]:.2f} s, {foretold[1]:.2f} s, {foretold[0] / foretold[1]:.2f})",
        "",
        "| ranks | layers | seconds | waiting | limit | MB/s from a rank to the next |",
        "|---" * 6 + "|",
    ]
    model, _ = document(options)
    size = pack(model.initial_state(1)).nbytes / options.layers
    wire, rows = size / options.bandwidth if options.bandwidth else 0.0, []
    for ranks in options.simulated:
        for layers in options.simulated_layers:
            x = simulate(times, layers, options.simulated_tokens // options.segment, ranks, wire)
            rate = size / min(times.forward, times.backward)
            rows.append({"ranks": ranks, "layers": layers, **x._asdict(), "bytes_a_second": rate})
            lines.append(
                f"| {ranks} | {layers} | {x.seconds:.1f} | {x.waiting:.1%} | {x.limit:.1%} | {rate / 1e6:.1f} |"
            )
    print("\n".join(lines))
    if options.out:
        facts = {"times": times._asdict(), "state_bytes_a_layer": size}
        told = ", ".join(f"{name} {x * 1e3:.1f} ms" for name, x in times._asdict().items())
        path = options.out / "wavefront-cpu"
        record.write(path.with_suffix(".json"), **facts, seconds=seconds, ratio=ratio, foretold=foretold, rows=rows)
        record.write_table(path.with_suffix(".md"), lines, f"a segment: {told}; a layer's state: {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
