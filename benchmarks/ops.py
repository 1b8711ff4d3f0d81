"""The recurrences forward and backward, with the gradients of all inputs and of the state, beside other software.

    python benchmarks/ops.py [--device cuda] [--op wkv7 wkv6] [--dtype fp32 bf16] [--batch 1] [--tokens 1024]
        [--heads 8] [--size 64] [--kernels NAME ...] [--rounds 7] [--threads N] [--out FOLDER]

Every kernel gets the same inputs and the same gradients of y and of the last state; its answer is compared with
float64 on two heads. Each runs once in every round, in shuffled order; figures are medians. Peers: `fla-layer` are
flash-linear-attention's Triton kernels with the options of its own layers, `fla-naive` its torch chunk form of RWKV-7.
Its torch forms of RWKV-6 have no state, or no gradient; there `chunked` is the torch form to compare with.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
from peers import Kernel, peers
from rounds import interleaved
from torch import Tensor

from infctx import ops
from infctx.ops.backends import available

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv6": ops.wkv6, "wkv7": ops.wkv7}
OUTPUTS = {
    "wkv6": ("y", "last", "dr", "dk", "dv", "dw", "du", "dstate"),
    "wkv7": ("y", "last", "dr", "dw", "dk", "dv", "da", "db", "dstate"),
}
SLOWER = ("chunked", "fla", "reference")  # than compiled kernels, in this order
CHECKED = 2  # heads


class Problem(NamedTuple):
    """Inputs with the state as the last of them, and the gradients of y and of the last state."""

    inputs: list[Tensor]
    gradients: list[Tensor]


def make(op: str, dtype: str, options: argparse.Namespace) -> Problem:
    """Inputs of the sizes that occur in models."""
    torch.manual_seed(0)
    shape = (options.batch, options.tokens, options.heads, options.size)
    r, k, v, w, kk, rate, dy = (torch.randn(shape, device=options.device) for _ in range(7))
    state, dstate = (torch.randn(options.batch, *shape[2:], shape[3], device=options.device) for _ in range(2))
    low = DTYPES[dtype]
    if op == "wkv6":
        u = torch.randn(shape[2:], device=options.device)
        inputs = [r.to(low), k.to(low), v.to(low), -(w - 2).exp(), u, state]
    else:
        kk = torch.nn.functional.normalize(kk, dim=-1)
        rest = [x.to(low) for x in (k, v, -kk, kk * rate.sigmoid())]
        inputs = [r.to(low), -0.6065 * w.sigmoid(), *rest, state]
    return Problem([x.requires_grad_() for x in inputs], [dy.to(low), dstate])


def ours(op: str, backend: str) -> Kernel:
    """An op of infctx, by one of its backends."""
    return lambda x: OPS[op](*x, backend=backend)


def kernels(op: str, options: argparse.Namespace) -> dict[str, Kernel | str]:
    """Name -> what computes the op, or why it is not there; our own first."""
    names = sorted(available(options.device), key=lambda x: SLOWER.index(x) + 1 if x in SLOWER else 0)
    found: dict[str, Kernel | str] = {name: ours(op, name) for name in names}
    if not options.kernels:
        found.pop("reference")
    found |= peers(op, options.device, options.tokens)
    return {name: x for name, x in found.items() if name in (options.kernels or found)}


def step(kernel: Kernel, problem: Problem) -> list[Tensor]:
    """Forward and backward: y, the last state, and all gradients."""
    outputs = kernel(problem.inputs)
    return [*outputs, *torch.autograd.grad(outputs, problem.inputs, problem.gradients)]


def heads(tensors: list[Tensor]) -> list[Tensor]:
    """The heads that are checked, of inputs (or their gradients) and the state at the end."""
    cut = [x[:CHECKED] if x.dim() == 2 else x[:, :, :CHECKED] for x in tensors[:-1]]
    return [x.detach().cpu().double() for x in (*cut, tensors[-1][:, :CHECKED])]


def errors(op: str, found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of the answer, for each output."""
    parts = [*heads(found[:2]), *heads(found[2:])]
    pairs = zip(OUTPUTS[op], parts, expected, strict=True)
    return {name: float((x - y).norm() / y.norm()) for name, x, y in pairs}


def measure(op: str, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kernel. Those that fail say why."""
    problem = make(op, dtype, options)
    exact = Problem([x.requires_grad_() for x in heads(problem.inputs)], heads(problem.gradients))
    expected = [x.detach() for x in step(lambda x: OPS[op](*x, backend="chunked"), exact)]
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    given = kernels(op, options)
    for name, kernel in given.items():
        row = rows[name] = {"op": op, "dtype": dtype, "kernel": name}
        if isinstance(kernel, str):
            row["absent"] = kernel
            continue
        try:
            row["errors"] = errors(op, step(kernel, problem), expected)
            row["error"] = max(row["errors"].values())
            seconds[name] = []
        except ValueError as error:  # a kernel that is not for these inputs says so
            row["absent"] = str(error)
        except Exception as error:  # whatever one kernel does, the others are measured
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def count_bytes(name: str) -> None:
        if options.device == "cuda":
            rows[name]["bytes"] = torch.cuda.max_memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()

    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    timed = {name: partial(step, given[name], problem) for name in seconds}  # type: ignore[arg-type]
    seconds = interleaved(timed, options.rounds, options.device, count_bytes)
    for name, times in seconds.items():
        if times:
            rows[name] |= {"seconds": statistics.median(times), "best": min(times)}
            rows[name]["ratio"] = rows[name]["seconds"] / rows[next(iter(seconds))]["seconds"]
    return list(rows.values())


def table(rows: list[dict[str, Any]], tokens: int) -> list[str]:
    """Markdown."""
    lines = ["| op | dtype | kernel | ms | times the first | tokens/s | error | memory |", "|---" * 8 + "|"]
    for row in rows:
        what = f"| {row['op']} | {row['dtype']} | {row['kernel']} |"
        if "seconds" not in row:
            lines.append(f"{what} {row.get('failed') or row.get('absent') or 'not timed'} | | | | |")
            continue
        memory = f"{row['bytes'] / 2**20:.0f} MiB" if "bytes" in row else ""
        speed = f"{1e3 * row['seconds']:.2f} | {row['ratio']:.2f} | {tokens / row['seconds']:.0f}"
        lines.append(f"{what} {speed} | {row['error']:.1e} | {memory} |")
    return lines


def main() -> None:
    """Measure, print, and write after every op and dtype; fail if a kernel of ours did, or gave a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--op", nargs="+", default=["wkv7", "wkv6"], choices=OPS)
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", help="which to measure, all by default")
    for name, value in {"batch": 1, "tokens": 1024, "heads": 8, "size": 64, "rounds": 7, "threads": None}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("device", "batch", "tokens", "heads", "size", "rounds")}
    sizes["threads"] = torch.get_num_threads()
    remark = ", ".join(f"{name} {value}" for name, value in sizes.items())
    rows: list[dict[str, Any]] = []
    for op in options.op:
        for dtype in options.dtype:
            rows += measure(op, dtype, options)
            lines = table(rows, options.batch * options.tokens)
            if options.out:
                path = options.out / f"ops-{options.device}-b{options.batch}-t{options.tokens}"
                record.write(path.with_suffix(".json"), **sizes, rows=rows)
                record.write_table(path.with_suffix(".md"), lines, remark)
    print("\n".join(lines))
    ours = [row for row in rows if not row["kernel"].startswith("fla") and "absent" not in row]
    wrong = [f"{x['op']} {x['kernel']}" for x in ours if not x.get("error", 1) < BOUNDS[x["dtype"]]]
    if wrong:
        sys.exit(f"failed or wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
