"""What stands around the recurrence of RWKV-7, forward and backward, plain and compiled; its share of a training step.

    python benchmarks/fused.py [--device cuda] [--precision fp32 bf16] [--batch 1] [--tokens 1024] [--width 512]
        [--layers 6] [--rounds 7] [--threads N] [--out FOLDER]

Each part runs once in every round in both forms, in shuffled order, and so does a step of the whole model; figures are
medians. A share is what the part takes in all layers, over the step whose neighbours all have that form.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import record
import torch
from rounds import interleaved
from step import ours
from torch import Tensor

from infctx.ops import BACKENDS, fused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = ("plain", "compiled")
Part = Callable[[], None]


def parts(form: str, precision: str, options: argparse.Namespace) -> dict[str, Part]:
    """The neighbours of one layer, as `models/rwkv7.py` calls them."""
    low, size = DTYPES[precision], 64
    shape, device = (options.batch, options.tokens, options.width), options.device
    # On the CPU the recurrence takes float32, on a GPU what the layers compute in.
    inner = torch.float32 if device == "cpu" else low

    def tensor(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).requires_grad_()

    def channels(n: int) -> list[Tensor]:
        return [tensor(options.width) for _ in range(n)]

    heads = (*shape[:2], options.width // size, size)
    x, carried, mixes, hidden = (
        tensor(*shape),
        tensor(shape[0], shape[2]),
        channels(6),
        tensor(*shape[:2], 4 * shape[2]),
    )
    hidden = hidden.detach().to(low).requires_grad_()
    decay, rate, k, v, mix, first, g = (tensor(*shape, dtype=low) for _ in range(7))
    y, r, *kv = (tensor(*heads, dtype=inner) for _ in range(4))
    base, r_k = tensor(1, 1, shape[2]), tensor(*heads[2:])

    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "token shift, 6 mixes": lambda: tuple(fused.shift_mix(x, carried, mixes, None, low, form=form)[0]),
        "token shift, 1 mix": lambda: tuple(fused.shift_mix(x, carried, mixes[:1], None, low, form=form)[0]),
        "relu squared": lambda: (fused.relu_squared(hidden, form),),
        "gate and keys": lambda: fused.rwkv7_prepare(
            decay, rate, k, v, *mixes[:4], heads[2], inner, fused.Residual(mix, base, first), form
        ),
        "norm, bonus and gate": lambda: (fused.rwkv7_output(y, r, *kv, g, *mixes[:2], r_k, low, form),),
    }

    def both(call: Callable[[], tuple[Tensor, ...]]) -> Part:
        gradients = [torch.randn_like(y) for y in call()]
        return lambda: torch.autograd.backward(call(), gradients)

    return {name: both(call) for name, call in calls.items()}


def measure(precision: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each part, and one for the step."""
    things: dict[str, Part] = {}
    for form in FORMS:
        things |= {f"{form} {name}": part for name, part in parts(form, precision, options).items()}
        kernel = options.device if form == "compiled" else f"plain-{options.device}"
        things[f"{form} step"] = ours("rwkv7", kernel, options, options.tokens, precision)
    seconds = interleaved(things, options.rounds + 1, options.device)
    medians = {name: statistics.median(x[1:]) for name, x in seconds.items()}
    rows = []
    for name in [*parts("plain", precision, options), "step"]:
        plain, compiled = (medians[f"{form} {name}"] for form in FORMS)
        layers = 1 if name == "step" else options.layers
        shares = [layers * x / medians[f"{form} step"] for form, x in zip(FORMS, (plain, compiled), strict=True)]
        rows.append({"precision": precision, "part": name, "seconds": [plain, compiled], "shares": shares})
    return rows


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    sizes = {"batch": 1, "tokens": 1024, "width": 512, "layers": 6, "vocab": 4096, "rounds": 7, "threads": None}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # Models leave the neighbours plain with kernels of any other name.
    BACKENDS[f"plain-{options.device}"] = BACKENDS[options.device]
    rows = [row for precision in options.precision for row in measure(precision, options)]
    lines = ["| precision | part | plain, ms | share | compiled, ms | share | gain |", "|---" * 7 + "|"]
    for row in rows:
        (plain, compiled), shares = row["seconds"], [f"{x:.1%}" for x in row["shares"]]
        times = f"{1e3 * plain:.2f} | {shares[0]} | {1e3 * compiled:.2f} | {shares[1]} | {plain / compiled:.2f}"
        lines.append(f"| {row['precision']} | {row['part']} | {times} |")
    print("\n".join(lines))
    if options.out:
        record.write(options.out / f"fused-{options.device}.json", options=str(options), rows=rows)
        record.write_table(options.out / f"fused-{options.device}.md", lines, str(options).removeprefix("Namespace"))


if __name__ == "__main__":
    main()
