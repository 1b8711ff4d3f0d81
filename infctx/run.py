"""What a run writes: its folder, a line of figures for each step, checkpoints, a progress bar."""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase
from torch import Tensor
from tqdm import tqdm

from infctx.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from infctx.curves import METRICS, TRAINED, VALIDATION, drop_later
from infctx.task import DISTANCES

PREFIX = "model."  # of the weights inside the LightningModule
END = "ended.json"


class Metrics(Callback):
    """A line of `metrics.jsonl` after each optimizer step, and of `validation.jsonl` after each validation."""

    def __init__(self, folder: Path) -> None:
        self.file, self.validation_file = folder / METRICS, folder / VALIDATION
        self.last: dict[str, Any] = {}
        self._step, self._clock = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say what is ahead; forget the lines of steps that a resumed run will make again."""
        if trainer.is_global_zero:
            print(pl_module.trained)
            self.file.parent.mkdir(parents=True, exist_ok=True)  # config.yaml may come later
            (self.file.parent / TRAINED).write_text(pl_module.trained + "\n", encoding="utf-8")
            print(trainer.datamodule.describe(pl_module.horizon), flush=True)  # type: ignore[attr-defined]
        self._step, self._clock = trainer.global_step, time.perf_counter()
        for file in (self.file, self.validation_file):
            if trainer.is_global_zero:
                drop_later(file, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Write the figures of a step that has just been made."""
        if trainer.global_step == self._step:
            return
        seconds = time.perf_counter() - self._clock
        self._step, self._clock = trainer.global_step, time.perf_counter()
        sums = pl_module.take_step_sums(seconds)
        filled = sums["position_tokens"].nonzero().flatten().tolist()
        self.last = {
            "step": trainer.global_step,
            "tokens": pl_module.counts["tokens"],
            "documents": pl_module.counts["documents"],
            "loss": float(sums["loss_sum"] / sums["tokens"].clamp(min=1)),
            "lr": pl_module.learning_rate,
            "grad_norm": pl_module.grad_norm,
            "tokens_per_second": float(sums["seen"][0]) / seconds,
            "peak_memory_bytes": peak_memory(pl_module.device),
            "seconds": pl_module.counts["seconds"],
            "position_loss": [[i, float(sums["position_loss"][i]), int(sums["position_tokens"][i])] for i in filled],
            "source_loss": by_source(trainer.datamodule.train.names, sums["source_loss"], sums["source_tokens"]),  # type: ignore[attr-defined]
        }
        if far := border_norms(sums["border_gradient"]):
            self.last["border_gradient"] = far
        if len(set(pl_module.group_rates.values())) > 1:
            self.last["group_lr"] = list(pl_module.group_rates.items())
        if trainer.is_global_zero:
            with self.file.open("a") as stream:
                stream.write(json.dumps(self.last) + "\n")
        numbers = {key: value for key, value in self.last.items() if not isinstance(value, list)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the loss of the held-out documents."""
        if trainer.is_global_zero and trainer.state.fn == "fit":
            names, sums = trainer.datamodule.held_out.names, pl_module.validation_sums[:, 1:].cpu()  # type: ignore[attr-defined]
            line = {"step": trainer.global_step, "loss": float(trainer.callback_metrics["validation_loss"]),
                    "source_loss": by_source(names, *sums)}  # fmt: skip
            with self.validation_file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def by_source(names: list[str], losses: Tensor, tokens: Tensor) -> list[list[Any]]:
    """[name, summed loss, supervised tokens] of each source that had any. Args: losses, tokens: (sources,)."""
    rows = zip(names, losses.tolist(), tokens.tolist(), strict=True)
    return [[name, loss, int(count)] for name, loss, count in rows if count]


class Checkpoint(CheckpointBase):
    """Training checkpoints that a run goes on from; the end of a run is always saved.

    Args:
        every_n_steps: optimizer steps between two of them.
        keep: how many of the newest stay.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 3) -> None:
        for key, value in {"every_n_steps": every_n_steps, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"checkpoint.{key} must be at least 1, got {value}")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.folder = Path("runs", "unnamed")  # of the run: the command decides it
        self.resume: Path | None = None
        self.limits: list[int | None] = []  # max_epochs and max_steps as the recipe has them
        self._saved = 0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Ranks that were started one by one, by no launcher we know, decided by themselves: they must agree."""
        own = [str(self.folder.absolute()), self.resume and str(self.resume.absolute())]
        first = trainer.strategy.broadcast(own)
        if first != own:
            raise ValueError(
                f"rank {trainer.global_rank} would write to {own[0]} and go on from {own[1]}, rank 0 to {first[0]} and "
                f"from {first[1]}: give --name and --resume PATH"
            )

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What was saved after an epoch's end, as if saved with its last window: else, with max_steps, Lightning takes
        the next epoch for the one that was read to its end."""
        loop = checkpoint["loops"]["fit_loop"]
        for which in ("current", "total"):
            epochs, windows = (loop[key][which] for key in ("epoch_progress", "epoch_loop.batch_progress"))
            if 0 < epochs["ready"] == epochs["processed"]:
                epochs["processed"] = epochs["completed"] = epochs["ready"] - 1
                windows["completed"] = windows["processed"] - 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """What is there already need not be saved again; the run has not ended any more."""
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            (self.folder / END).unlink(missing_ok=True)
            for part in self.folder.glob("checkpoints/.step-*"):  # of a process that was killed while it saved
                shutil.rmtree(part)
            for later in checkpoints(self.folder):  # this run takes another way from here
                if int(later.name[5:]) > trainer.global_step:
                    print(f"checkpoint removed, later than the step resumed from: {later}")
                    shutil.rmtree(later)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Save at every n-th step, and where the run stops: after it the epoch would count as read to its end."""
        _count_epoch(trainer)
        stops = trainer.should_stop or trainer.global_step == trainer.max_steps
        if trainer.global_step > self._saved and (stops or trainer.global_step % self.every_n_steps == 0):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the end, and note where it was."""
        if trainer.global_step > self._saved:
            self._save(trainer)
        if trainer.is_global_zero and at_its_end(trainer):
            part = self.folder / f".{END}"
            part.write_text(json.dumps([trainer.global_step, *self.limits]))
            part.replace(self.folder / END)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "checkpoints" / f"step-{trainer.global_step}")
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            for folder in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(folder)


def _count_epoch(trainer: pl.Trainer) -> None:
    """A run resumed at the end of an epoch leaves the next one uncounted, and what it saves then can not be resumed."""
    progress: Any = trainer.fit_loop.epoch_progress  # its type does not know `processed`
    for count in (progress.current, progress.total):
        count.ready = count.started = count.processed + 1


def at_its_end(trainer: pl.Trainer) -> bool:
    """Whether all optimizer steps are made, by the plan: Lightning may end for other reasons, and miscount epochs."""
    return trainer.global_step >= trainer.datamodule.total_steps()  # type: ignore[attr-defined]


class FolderCheckpoints(CheckpointIO):
    """Lightning's checkpoint as a verified folder, with the weights in a file of their own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it whole or not at all. Args: storage_options: {"together": True} if each rank has a part of it."""
        state = checkpoint.pop("state_dict")
        weights = {name.removeprefix(PREFIX): x for name, x in state.items()}
        facts = {"step": checkpoint["global_step"], "torch": torch.__version__}
        if base := checkpoint.get("infctx", {}).get("base"):
            facts["base"] = base
        save_checkpoint(path, weights, checkpoint, facts, **(storage_options or {}))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Verify it and read it; nothing but tensors and plain values is ever read."""
        weights, checkpoint = load_checkpoint(path)
        return {**checkpoint, "state_dict": {PREFIX + name: x for name, x in weights.items()}}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it."""
        shutil.rmtree(path)


class Progress(ProgressBar):
    """Tokens read of all that the run will read; the time left is by what this process has done itself."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics
        self._bar: Any = None

    def disable(self) -> None:
        """Lightning's way to silence all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar where the run stands."""
        tokens, self._documents = trainer.datamodule.total_tokens()  # type: ignore[attr-defined]
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=tokens, initial=pl_module.counts["tokens"], unit=" tokens", unit_scale=True, dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 10, disable=not getattr(self, "_enabled", True),
        )  # fmt: skip

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Move on after a step."""
        if self.metrics.last.get("tokens", 0) > self._bar.n:
            done = f"{pl_module.counts['documents']:,}/{self._documents:,}"
            self._bar.set_postfix(
                step=trainer.global_step, documents=done, loss=f"{self.metrics.last['loss']:.3f}", refresh=False
            )
            self._bar.update(pl_module.counts["tokens"] - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._bar.close()


def read_end(run: Path) -> list[int] | None:
    """Step, max_epochs and max_steps with which a run came to its end; None if it has not."""
    try:
        return json.loads((run / END).read_text())
    except (OSError, ValueError):
        return None


def border_norms(squares: torch.Tensor) -> list[list[float]]:
    """(distance in segments from the window's end, norm) where a gradient passes. Args: squares: of DISTANCES."""
    return [[d, float(f"{x:.6g}")] for d, x in zip(DISTANCES, squares.sqrt().tolist(), strict=True) if x > 0]


def peak_memory(device: torch.device) -> int:
    """The largest memory so far, in bytes: of the device's allocator, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
