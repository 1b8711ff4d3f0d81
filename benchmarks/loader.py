"""How fast windows are loaded, beside how fast a tiny model is trained on them.

    python benchmarks/loader.py [--recipe recipes/tiny.yaml] [--documents 100000] [--rounds 5] [--threads N]
        [--out benchmarks/results]

Prepared text, as a run reads it: `long`: one document of random words, 4,000,000 bytes; `short`: many documents of
1 to 200 bytes; `masked`: as many prompts and completions. In each round, in shuffled order, all windows of an epoch
are loaded, a plan made first as at the beginning of an epoch, and the recipe's model makes optimizer steps (loss,
exact gradient, clipping, AdamW) on the first windows of `long`. Figures are medians of tokens a second.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import record
import torch
import yaml
from rounds import interleaved

import infctx
from infctx.bptt import window_loss
from infctx.data import DocumentData
from infctx.optim import OptimizerConfig, make_optimizer
from infctx.sources import Source

STEPS = 2  # of the optimizer, in a round
KINDS = ("long", "short", "masked")


def write(folder: Path, documents: int) -> dict[str, Source]:
    """The files that are read."""
    drawn, text = random.Random(0), "\n\n".join(topics.values())
    (folder / "long.txt").write_text((text * (4_000_000 // len(text) + 1))[:4_000_000])
    begins = [drawn.randrange(len(text) - 200) for _ in range(documents)]
    texts = [text[i : i + drawn.randint(2, 200)] for i in begins]
    parts = [{"text": x, "prompt": x[: len(x) // 2], "completion": x[len(x) // 2 :]} for x in texts]
    (folder / "short.jsonl").write_text("\n".join(map(json.dumps, parts)))
    formats = (("long.txt", "text"), ("short.jsonl", "jsonl"), ("short.jsonl", "completion"))
    return {kind: Source(str(folder / name), form) for kind, (name, form) in zip(KINDS, formats, strict=True)}


def opened(source: Source, folder: Path, options: dict) -> DocumentData:
    """Prepared documents in the hands of a trainer."""
    data = DocumentData(**{**options, "source": source, "path": str(folder)})
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, accumulate_grad_batches=1, current_epoch=0,
                                   limit_train_batches=1.0)  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data


def load(data: DocumentData) -> None:
    """All windows of an epoch."""
    data.plan.cache_clear()
    for _ in data.train_dataloader():
        pass


class Training:
    """Optimizer steps of the recipe's model."""

    def __init__(self, recipe: dict, data: DocumentData) -> None:
        self.model = infctx.init_model(infctx.ModelConfig(**recipe["model"]["init"]))
        self.optimizer = make_optimizer(self.model, OptimizerConfig(**recipe["model"]["optimizer"]))
        loader = data.train_dataloader()
        self.windows = [loader.window(i) for i in range(STEPS)]
        self.tokens = sum(int((window.ids >= 0).sum()) for window in self.windows)

    def __call__(self) -> None:
        """One after another, as `fit` makes them."""
        state = None
        for window in self.windows:
            self.optimizer.zero_grad()
            loss, _, state = window_loss(self.model, window, state, normaliser=window.normaliser)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


def main() -> None:
    """Measure, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.yaml"))
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = yaml.safe_load(options.recipe.read_text())
    with tempfile.TemporaryDirectory() as folder:
        sources = write(Path(folder), options.documents)
        data = {kind: opened(source, Path(folder, kind), recipe["data"]) for kind, source in sources.items()}
        training = Training(recipe, data["long"])
        things = {kind: (lambda x=x: load(x)) for kind, x in data.items()} | {"training": training}
        seconds = interleaved(things, options.rounds + 1, "cpu")
        tokens = {kind: int(x.train.inputs.sum()) for kind, x in data.items()} | {"training": training.tokens}
    speed = {name: tokens[name] / statistics.median(x[1:]) for name, x in seconds.items()}
    for name, x in speed.items():
        print(f"{name:<9} {x:14,.0f} tokens/s  {x / speed['training']:8.1f} times training")
    facts = {"recipe": options.recipe.name, "documents": options.documents, "threads": torch.get_num_threads()}
    record.write(options.out / "loader.json", **facts, tokens_per_second=speed, seconds=seconds)


if __name__ == "__main__":
    main()
