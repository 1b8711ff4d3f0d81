"""A whole training step (forward, loss, backward, AdamW) beside the same step with other kernels and beside Llama.

python benchmarks/step.py [--device cuda] [--tokens 1024 4096] [--precision fp32 bf16] [--rounds 5] [--out FOLDER]

Every candidate makes one step in each round, in shuffled order; figures are medians of tokens a second. `none` is the
model with the recurrence replaced by a sum: what no kernel can beat. `fla-naive` takes flash-linear-attention's torch
form of it. `of peak` is 6 operations per token and parameter (without the embedding) over what this device does in
matrix products of that precision, measured in the same run.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import record
import torch
from peers import fla_naive
from rounds import interleaved
from torch import Tensor

import infctx
from infctx.bptt import window_loss
from infctx.models import rwkv7
from infctx.ops import BACKENDS
from infctx.segments import Window

Step = Callable[[], None]


class Nothing:
    """The recurrence taken out: y is the sum of the inputs, the state stays."""

    def saved(self, op, inputs, state):
        return 0

    def forward(self, op, inputs, state, borders, keep):
        return sum(inputs[1:], start=inputs[0]).to(inputs[0].dtype), state.clone(), state.new_empty(0)

    def backward(self, op, inputs, state, saved, dy, dstate, borders):
        return *(dy.to(x.dtype).clone() if x.shape == dy.shape else torch.zeros_like(x) for x in inputs), dstate.clone()


def with_fla(step: Step) -> Step:
    """The same step with flash-linear-attention's torch chunk form of RWKV-7, which autograd differentiates."""

    def run() -> None:
        ours = rwkv7.wkv7
        rwkv7.wkv7 = lambda *given: fla_naive(given[:7])
        try:
            step()
        finally:
            rwkv7.wkv7 = ours

    run.parameters, run.multiplied = step.parameters, step.multiplied
    return run


def ours(arch: str, kernel: str, options: argparse.Namespace, tokens: int, precision: str) -> Step:
    """A step of `window_loss` on one segment."""
    given = {"n_layer": options.layers, "n_embd": options.width, "vocab_size": options.vocab}
    config = infctx.ModelConfig(arch=arch, head_size=1 if arch == "rwkv4" else 64, **given)
    model = infctx.init_model(config, seed=0).to(options.device)
    model.kernel = kernel
    ids = torch.randint(options.vocab, (options.batch, 1, tokens + 1))
    start = torch.zeros(options.batch, 1, tokens, dtype=torch.bool)
    start[..., 0] = True
    window = Window(ids[..., :-1].to(options.device), ids[..., 1:].to(options.device), start, start.int())
    return train(model, lambda: window_loss(model, window, None)[0], precision, options)


def llama(options: argparse.Namespace, tokens: int, precision: str) -> Step:
    """The same step of a Llama of the same width, depth and about as many parameters, with SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.width, intermediate_size=3 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64, attn_implementation="sdpa",
        max_position_embeddings=tokens, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(options.device)
    ids = torch.randint(options.vocab, (options.batch, tokens), device=options.device)
    return train(model, lambda: model(input_ids=ids, labels=ids).loss, precision, options)


def train(model: torch.nn.Module, loss: Callable[[], Tensor], precision: str, options: argparse.Namespace) -> Step:
    """One optimizer step, whatever the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16) if precision == "bf16" else nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step.parameters = sum(x.numel() for x in model.parameters())
    step.multiplied = step.parameters - options.vocab * options.width
    return step


def matrix_peak(precision: str, device: str) -> float:
    """Operations a second in the fastest of some square matrix products."""
    n, dtype = (8192 if device == "cuda" else 2048), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(interleaved({"product": lambda: a @ b}, 10, device)["product"])


def measure(steps: dict[str, Step], tokens: int, rounds: int, device: str, peak: float) -> dict[str, dict[str, float]]:
    """Tokens a second of each: median and best of the rounds, after one that is not counted."""
    seconds = interleaved(steps, rounds + 1, device)
    return {
        name: {
            "median": tokens / statistics.median(x[1:]),
            "best": tokens / min(x[1:]),
            "parameters": steps[name].parameters,
            "of_peak": 6 * tokens * steps[name].multiplied / statistics.median(x[1:]) / peak,
        }
        for name, x in seconds.items()
    }


def candidates(options: argparse.Namespace, tokens: int, precision: str) -> dict[str, Step]:
    """Everything that can be measured here, the first being what the others are compared with."""
    names = options.kernels or (["cpu", "chunked"] if options.device == "cpu" else ["cuda", "chunked"])
    steps = {f"{arch} {name}": ours(arch, name, options, tokens, precision) for arch in options.arch for name in names}
    arch = options.arch[0]
    steps[f"{arch} none"] = ours(arch, f"{options.device}-none", options, tokens, precision)
    if importlib.util.find_spec("fla") and arch == "rwkv7" and options.batch == 1:
        steps[f"{arch} fla-naive"] = with_fla(ours(arch, options.device, options, tokens, precision))
    if importlib.util.find_spec("transformers"):
        steps["llama sdpa"] = llama(options, tokens, precision)
    return steps


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", nargs="+", default=["rwkv7", "rwkv6"])
    parser.add_argument("--kernels", nargs="+", help="backends of infctx")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    for name, value in {"batch": 1, "layers": 6, "width": 512, "vocab": 4096, "rounds": 5, "threads": None}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # By this name the models take the same compiled neighbours of the recurrence as with the kernel itself.
    BACKENDS[f"{options.device}-none"] = Nothing()
    peaks = {precision: matrix_peak(precision, options.device) for precision in options.precision}
    for tokens in options.tokens:
        rows = []
        lines = [
            "| tokens | precision | model and kernel | parameters | tokens/s | ratio | of peak |",
            "|---" * 7 + "|",
        ]
        for precision, peak in peaks.items():
            steps = candidates(options, tokens, precision)
            found = measure(steps, options.batch * tokens, options.rounds, options.device, peak)
            first = next(iter(found.values()))["median"]
            for name, x in found.items():
                rows.append({"tokens": tokens, "precision": precision, "name": name, **x, "ratio": x["median"] / first})
                what = f"{precision} | {name} | {x['parameters'] / 1e6:.1f} M | {x['median']:.0f}"
                lines.append(f"| {tokens} | {what} | {x['median'] / first:.2f} | {x['of_peak']:.0%} |")
        print("\n".join(lines))
        if options.out:
            path = options.out / f"step-{options.device}-l{options.layers}-d{options.width}-t{tokens}"
            facts = {"options": str(options), "threads": torch.get_num_threads(), "peaks": peaks}
            record.write(path.with_suffix(".json"), **facts, rows=rows)
            record.write_table(path.with_suffix(".md"), lines, str(facts))


if __name__ == "__main__":
    main()
