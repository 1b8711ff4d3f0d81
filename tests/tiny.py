"""Tiny models, windows and commands that the tests share."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import infctx
from infctx.config import ARCHITECTURES
from infctx.models.rwkv import RWKV
from infctx.segments import Sources, Window
from infctx.state import BlockState, KeyMemory, State, pack, select, unpack

ARCHS = sorted(ARCHITECTURES)
VOCAB = 50


def tiny_model(arch: str = "rwkv7", dtype: torch.dtype = torch.float64, spread: float = 0.3, **sizes: int) -> RWKV:
    """A model whose every parameter matters: the official initial values are full of zeros."""
    config = {"n_layer": 2, "n_embd": 32, "vocab_size": VOCAB, "head_size": 16} | sizes
    model = infctx.init_model(infctx.ModelConfig(arch, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=generator)
    return model.to(dtype)


def random_state(model: RWKV, n: int, seed: int = 2) -> State:
    """A state that nothing in it is zero or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    like, memory = model.initial_state(n), None
    flat = pack(like)
    state = unpack(torch.randn(flat.shape, generator=generator).to(flat), like)
    if model.config.arch == "rwkv4":  # a denominator is a sum of exponentials
        for block in state.blocks:
            block.wkv[:, 1].exp_()
    if like.memory is not None:
        lengths = torch.randint(2, 9, (n,), generator=generator)
        m = int(lengths.sum())
        keys = torch.randn(m, like.memory.keys.shape[1], generator=generator).to(like.memory.keys)
        tokens = torch.randint(VOCAB, (m,), generator=generator).int()
        memory = KeyMemory(tokens, keys, torch.cat([torch.zeros(1), lengths.cumsum(0)]).int())
    return State(state.blocks, memory)


def values(state: State) -> list[Tensor]:
    """What a state stands for, as (N, ...) tensors and the memory: RWKV-4's exponent only scales two other numbers."""
    out = []
    for att, ffn, wkv in state.blocks:
        scaled = wkv[:, :2] * wkv[:, 2:].detach().exp() if wkv.dim() == 3 else wkv
        out += [att, ffn, scaled] if wkv.numel() else [att, ffn]
    return out + ([state.memory.keys, state.memory.tokens] if state.memory else [])


class Carried:
    """A state whose tensors are leaves: `sources` for gradients, `state()` to go on from."""

    def __init__(self, state: State) -> None:
        self.like, self.sources = state, [pack(state).detach().requires_grad_()]
        if state.memory:
            self.sources.append(state.memory.keys.detach().requires_grad_())

    def state(self) -> State:
        memory = self.like.memory and self.like.memory._replace(keys=self.sources[1])
        return unpack(self.sources[0], self.like, memory)

    def row(self, i: int) -> State:
        return select(self.state(), torch.tensor([i]))


def detached(state: State) -> State:
    memory = state.memory and KeyMemory(*(x.detach() for x in state.memory[:3]))
    return State(tuple(BlockState(*(x.detach() for x in block)) for block in state.blocks), memory)


def law(record, number: int, arch: str, error: float, bound: float) -> None:
    """Hold a law, and note its error for the table that benchmarks/laws.py makes."""
    record("law", f"{number} {arch} {error:.3e}")
    assert error < bound, f"law {number}, {arch}: {error:.1e}"


def make_window(
    lanes: int, segments: int, length: int, starts: tuple = (), padding: tuple = (), seed: int = 3
) -> Window:
    """Random tokens. starts: (lane, segment, place) of first tokens; padding: (lane, segment, place it begins)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (lanes, segments, length)
    tokens, targets = (torch.randint(VOCAB, shape, generator=generator) for _ in range(2))
    targets[torch.rand(shape, generator=generator) < 0.2] = -100
    start, ids = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int32)
    for place in starts:
        start[place] = True
    for lane, segment, place in padding:
        ids[lane, segment, place:] = -1
        targets[lane, segment, place:] = -100
        tokens[lane, segment, place:] = 0
    position = torch.arange(segments * length).view(1, segments, length).expand(shape)
    # Two documents in turn along each lane, of two sources of three.
    ids += (start.flatten(1).cumsum(1).view(shape) % 2).int() * (ids >= 0)
    return Window(tokens, targets, start, ids, position, sources=Sources(torch.tensor([2, 0], dtype=torch.int32), 3))


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def worst(left, right) -> float:
    """The largest relative difference between two lists of tensors; where b is zero, a must be."""
    return max((0.0 if not b.any() and not a.any() else relative(a, b)) for a, b in zip(left, right, strict=True))


def run(monkeypatch, *argv: str) -> None:
    """A command in this process."""
    from infctx.cli import main

    monkeypatch.setattr(sys, "argv", ["infctx", *argv])
    main(list(argv))


RECIPE = """
model:
  init: {arch: rwkv7, n_layer: 2, n_embd: 32, head_size: 16, vocab_size: 257}
  optimizer: {lr: 1.0e-2, warmup_steps: 2, weight_decay: 0.1}
data:
  source: {path: texts/*.txt, format: text}
  path: prepared
  tokenizer: bytes
  segment_length: 16
  segments_per_window: 3
  batch_size: 2
checkpoint: {every_n_steps: 2, keep: 100}
seed_everything: 7
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false}
"""


def make_project(folder: Path, lengths=(100, 37, 230, 61, 5, 150), recipe: str = RECIPE) -> Path:
    """A folder with texts and a recipe, as a user has it."""
    (folder / "texts").mkdir(parents=True)
    random = np.random.default_rng(0)
    words = ["the", "state", "carries", "what", "was", "read", "on", "\n"]
    for i, n in enumerate(lengths):
        text = " ".join(random.choice(words, n))[:n]
        (folder / "texts" / f"{i}.txt").write_text(text.ljust(n, "."))
    (folder / "recipe.yaml").write_text(recipe)
    return folder
