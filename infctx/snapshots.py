"""What a run notes of its model for its page: the norms of its states, and texts with the loss of each token.

N sequences, H heads, T tokens in a segment.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from infctx.bptt import run_alone, window_loss
from infctx.curves import METRICS, SAMPLES, STATE_NORMS, drop_later
from infctx.loader import Documents
from infctx.loss import IGNORED
from infctx.segments import Sequences, Window
from infctx.state import State
from infctx.task import Metrics, Task
from infctx.tokenizer import Tokenizer

DOCUMENTS = 3  # that are shown
READ = 8192  # tokens of each that are read at most, and four segments at most
SHOWN = (160, 320)  # tokens at the beginning and at the end of what was read
GAP = 80  # between them, that is not worth a break


class Snapshots(Callback):
    """A line of `state_norms.jsonl` with each checkpoint; `samples.json` at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget what a resumed run will note again."""
        if trainer.is_global_zero:
            drop_later(self.folder / STATE_NORMS, trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Note the states after the last window, of this rank's lanes."""
        if trainer.is_global_zero and pl_module.lanes is not None:
            norms = [[float(f"{x:.4g}") for x in layer] for layer in state_norms(pl_module.lanes)]
            with (self.folder / STATE_NORMS).open("a") as stream:
                stream.write(json.dumps({"step": trainer.global_step, "norms": norms}) + "\n")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Once the end is saved. Under engines with weights in pieces all ranks are needed for a forward."""
        if not (trainer.is_global_zero or pl_module.outline) or not (self.folder / METRICS).exists():
            return
        training, device = pl_module.training, trainer.strategy.root_device
        try:
            samples = _samples(trainer, pl_module.eval().to(device))  # Lightning has just moved it to the CPU
        except (RuntimeError, ValueError, OSError) as error:  # the run is what counts
            if pl_module.outline is not None:  # the other ranks wait
                raise
            print(f"samples: none, {(str(error).splitlines() or [type(error).__name__])[0]}")
            samples = []
        pl_module.train(training)
        if trainer.is_global_zero:
            part = self.folder / f".{SAMPLES}"
            part.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
            part.replace(self.folder / SAMPLES)


def _samples(trainer: pl.Trainer, pl_module: Any) -> list[dict[str, Any]]:
    """Documents with the loss of each token."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    documents, pieces = data.held_out or data.train, pl_module.outline is not None
    runner = trainer.strategy.runner if pieces else run_alone  # type: ignore[attr-defined]
    context = nullcontext() if pieces else trainer.precision_plugin.forward_context()
    samples = []
    with torch.no_grad(), context:
        for document in _chosen(documents):
            tokens, learnt = _read(documents, document, min(READ, 4 * data.segment_length))
            recorder = Recorder(runner)
            window_loss(pl_module.seen, _window(tokens, min(READ, data.segment_length)), None, runner=recorder)
            losses = [None, *(x if y else None for x, y in zip(recorder.losses(), learnt[1:], strict=True))]
            samples.append(
                {
                    "source": documents.names[int(documents.source[document])],
                    "held_out": data.held_out is not None,
                    "tokens": int(documents.inputs[document]) + 1,
                    "segment_length": data.segment_length,
                    "parts": _parts(data.tokenizer, tokens, losses),
                }
            )
    return samples


class Recorder:
    """A `bptt.Runner` that keeps the loss of each token: of one lane, on this rank."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.found = runner, dict[int, Tensor]()

    def __call__(self, task: Task, lanes: Tensor, keys: Tensor | None, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """See `bptt.Runner`."""
        kept = _Kept(*task.metrics)
        kept.found = self.found
        return self.runner(task._replace(metrics=kept), lanes, keys, fresh)

    def losses(self) -> list[float]:
        """In nats, in the order of the tokens."""
        return [x for _, found in sorted(self.found.items()) for x in found.tolist()]


class _Kept(Metrics):
    found: dict[int, Tensor]

    def add(self, segment: int, sequence: Sequences, losses: Tensor) -> None:
        super().add(segment, sequence, losses)
        self.found[segment] = losses


def state_norms(state: State) -> list[list[float]]:
    """The 2-norm of each head's WKV state, layer by layer, as the mean over the sequences.

    Layers without one have no number. RWKV-4 has one head, and its state stands for numerator over denominator.
    """
    found = []
    for block in state.blocks:
        wkv = block.wkv.detach().double()
        if wkv.dim() == 3:
            norms = (wkv[:, 0] / wkv[:, 1].clamp(min=1e-30)).norm(dim=1, keepdim=True)  # fresh: 0 over 0
        elif wkv.dim() == 4:
            norms = wkv.flatten(2).norm(dim=2)
        else:
            norms = wkv.new_zeros(1, 0)
        found.append(norms.mean(0).tolist())
    return found


def _chosen(documents: Any) -> list[int]:
    """The first document of each source, then the next ones."""
    _, first = np.unique(np.asarray(documents.source), return_index=True)
    others = [i for i in range(min(len(documents), 2 * DOCUMENTS)) if i not in first]
    return [*map(int, sorted(first)), *others][:DOCUMENTS]


def _read(documents: Documents, document: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) from the beginning, and which of them are learnt."""
    end = min(int(documents.inputs[document]), limit) + 1
    return documents.tokens(document, 0, end), documents.mask(document, 0, end)


def _window(tokens: np.ndarray, length: int) -> Window:
    """One lane: the document in segments, its loss wanted everywhere."""
    n, segments = len(tokens) - 1, -(-(len(tokens) - 1) // length)
    shape = (1, segments, length)
    rows = {name: np.zeros(segments * length, np.int64) for name in ("tokens", "targets", "ids")}
    rows["tokens"][:n], rows["targets"][:n] = tokens[:-1], tokens[1:]
    rows["targets"][n:], rows["ids"][n:] = IGNORED, -1
    x = {name: torch.from_numpy(row).view(shape) for name, row in rows.items()}
    start = torch.zeros(shape, dtype=torch.bool)
    start[0, 0, 0] = True
    return Window(x["tokens"], x["targets"], start, x["ids"].int(), torch.arange(segments * length).view(shape))


def _parts(tokenizer: Tokenizer, tokens: np.ndarray, losses: list[float | None]) -> list[dict[str, Any]]:
    """The beginning and the end of what was read, or all of it if that is not longer; no character is broken."""
    n, (head, tail) = len(tokens), SHOWN
    pieces = list(_pieces(tokenizer, tokens.tolist(), losses))
    if n <= head + tail + GAP:
        return [{"begin": 0, "pieces": [x[1:] for x in pieces]}]
    last = [x for x in pieces if x[0] >= n - tail]
    return [
        {"begin": 0, "pieces": [x[1:] for x in pieces if x[0] < head]},
        {"begin": last[0][0] if last else n, "pieces": [x[1:] for x in last]},
    ]


def _pieces(
    tokenizer: Tokenizer, tokens: list[int], losses: list[float | None]
) -> Iterator[tuple[int, str, list[float | None]]]:
    """A text, the place of its first token, and the losses of all that make it: a character may be of several."""
    taken = done = 0

    def ids() -> Iterator[int]:
        nonlocal taken
        for token in tokens:
            taken += 1
            yield token

    rounded = [None if x is None else round(x, 3) for x in losses]
    for text in tokenizer.stream(ids()):
        if taken > done:
            yield done, text, rounded[done:taken]
        else:  # what was left over: of a token that has given a piece already
            yield done, text, []
        done = taken
    if done < taken:  # tokens without a text: the end of the document
        yield done, "", rounded[done:taken]
