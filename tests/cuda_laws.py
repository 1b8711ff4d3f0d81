"""Law 6 on a GPU: every kernel against the float64 definition on the CPU. Needs no pytest, and runs by itself:

    python tests/cuda_laws.py [--device cuda] [--backends NAME ...] [--out FOLDER]

A job is one op by one backend in one dtype, in a process of its own: one that crashes takes no other with it. Its cases
are lengths, packed sequences, head sizes, decays near 0 and near 1, and equal keys; all have non-zero states and a loss
on the last state. Buffers begin as NaN, and a second run must give the same bits.
"""

import argparse
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from recurrences import CONSTANTS, OPS, PACKED, everything, inputs
from tiny import worst

from infctx.ops.backends import available
from infctx.ops.cuda import TENSOR

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-5, "bf16": 8e-3, "fp16": 1.5e-3}
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 1000]
DECAY = {"wkv4": 0, "wkv6": 3, "wkv7": 1}
PROCESSES = min(12, os.cpu_count() or 1)


def jobs(device: str) -> list[tuple[str, str, str, str]]:
    """Device, op, backend and dtype of what can run; the portable backends have tests of their own."""
    names = [x for x in available(device) if x.split("-")[0] in (device, "fla")]
    names.sort(key=lambda x: x != "fla")  # takes longest, to compile
    every = [(device, op, backend, dtype) for backend in names for op in OPS for dtype in DTYPES]
    return [
        job
        for job in every
        if not (job[2] == "fla" and job[1] == "wkv4")
        and not (job[2] == "cuda-tensor" and (job[1] not in TENSOR or job[3] == "fp32"))
    ]


def cases(op: str, backend: str, dtype: str) -> Iterator[tuple[str, list[torch.Tensor], dict[str, torch.Tensor]]]:
    """Name, arguments on the CPU, and options."""

    def make(b: int = 2, t: int = 130, h: int = 3, n: int = 64, **more: Any) -> list[torch.Tensor]:
        args = inputs(op, b, t, h=h, n=n, dtype=DTYPES[dtype], **more)
        for i in {DECAY[op], *CONSTANTS[op]}:
            args[i] = args[i].detach().float()
        return args

    for t in LENGTHS:
        yield f"{t} tokens", make(t=t), {}
    cu = torch.tensor([0, *PACKED, 300]).cumsum(0)
    yield "packed", make(b=1, t=int(cu[-1]), sequences=len(cu) - 1), {"cu_seqlens": cu}
    for n in TENSOR.get(op, ()) if backend == "cuda-tensor" else (16, 32, 128):
        yield f"head size {n}", make(t=65, n=n), {}
    yield "decays near 1", make(lowest=-1e-7), {}
    if op != "wkv7" or dtype == "fp32" or backend in ("cuda-recurrent", "fla"):  # tensor cores take what RWKV-7 has
        yield "decays near 0", make(lowest=-18.42), {}
        mixed = make()
        chosen = torch.rand(mixed[DECAY[op]].shape, generator=torch.Generator().manual_seed(1)) < 0.3
        mixed[DECAY[op]] = torch.where(chosen, -18.42, -1e-7)
        yield "decays of all sizes", mixed, {}
    if op == "wkv7":
        equal = make()
        kk = torch.nn.functional.normalize(torch.ones_like(equal[4]).float(), dim=-1).to(equal[4])
        yield "equal keys", [*equal[:4], -kk, kk, equal[6]], {}


def run(job: tuple[str, str, str, str]) -> dict[str, Any]:
    """The worst relative error of outputs, states and gradients of each case, or what went wrong."""
    device, op, backend, dtype = job
    if backend == "fla":
        from fla_interpreted import take_first_configurations

        take_first_configurations()
    # The exponents of RWKV-4 are sums of as many roundings as there are tokens; fla rounds more often than we do.
    bound = BOUNDS[dtype] * (6 if op == "wkv4" else 2 if backend == "fla" and dtype != "fp32" else 1)
    row = {"op": op, "backend": backend, "dtype": dtype, "bound": bound, "errors": {}, "wrong": []}
    for name, args, options in cases(op, backend, dtype):
        given = [x.detach().to(device).requires_grad_() for x in args]
        exact = [x.detach().double().requires_grad_() for x in args]
        there = {key: x.to(device) for key, x in options.items()}
        try:
            found, again = (everything(OPS[op], given, backend=backend, **there) for _ in range(2))
            expected = everything(OPS[op], exact, backend="reference", **options)
            row["errors"][name] = error = worst([x.detach().cpu() for x in found], expected)
            if not error < bound:
                row["wrong"].append(f"{name}: error {error:.1e}")
            if not all(map(torch.equal, found, again)):
                row["wrong"].append(f"{name}: other bits the second time")
        except Exception as error:  # the other cases are still of interest
            row["wrong"].append(f"{name}: {type(error).__name__}: {error}".splitlines()[0][:200])
    return row


def run_alone(job: tuple[str, str, str, str]) -> dict[str, Any]:
    """`run` in a process of its own, with buffers that begin as NaN."""
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    return run(job)


def summary(rows: list[dict[str, Any]]) -> str:
    """How many cases there were."""
    count, wrong = (sum(len(row[key]) for row in rows) for key in ("errors", "wrong"))
    return f"{count} cases of {len(rows)} kernels, {wrong} wrong"


def save(rows: list[dict[str, Any]], lines: list[str], folder: Path | None) -> None:
    """Write what is known so far."""
    if folder:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        import record

        record.write(folder / "laws.json", rows=rows)
        record.write_table(folder / "laws.md", lines, summary(rows))


def main() -> None:
    """Run all jobs, print and write their table; fail if a case does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", help="all by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    todo = [x for x in jobs(options.device) if x[2] in (options.backends or [x[2]])]
    spawn = multiprocessing.get_context("spawn")
    rows, lines = [], ["| op | backend | dtype | cases | worst error | bound | wrong |", "|---" * 7 + "|"]
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn, max_tasks_per_child=1) as pool:
        for job, done in [(job, pool.submit(run_alone, job)) for job in todo]:
            error = done.exception()
            row = {**dict(zip(("op", "backend", "dtype"), job[1:])), "errors": {}, "bound": 0.0, "wrong": [str(error)]}
            row = row if error else done.result()
            rows.append(row)
            worst_error = max(row["errors"].values(), default=float("nan"))
            wrong = "; ".join(row["wrong"][:2]) + (f"; {len(row['wrong'])} in all" if len(row["wrong"]) > 2 else "")
            cells = [*job[1:], len(row["errors"]), f"{worst_error:.1e}", f"{row['bound']:.1e}", wrong]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
            save(rows, lines, options.out)
    print(summary(rows))
    if not rows or any(row["wrong"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
