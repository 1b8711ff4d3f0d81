"""Ranks that watch each other: one that dies or hangs ends the others, with a line that names it."""

import os
import sys
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from infctx.errors import UserError
from infctx.parallel.board import Hub, Link, Row

GRACE_SECONDS = 2.0  # for the main thread to come to an end of its own
PATIENCE_SECONDS = 6.0  # for the verdict, where a collective has failed


class Watch(Callback):
    """Ends this process within `timeout` when another rank is dead, silent, or hangs.

    A thread of each rank writes a row a second on a board in rank 0's process, and reads rank 0's verdict. A rank
    is at fault that has died, that was stopped or cut off, or that has not moved for the timeout and is behind others.

    Behind is counted in marks: a window begins, its backward begins, its update begins, it is done; a window of
    validation begins and is done. Every rank has the same windows, so makes the same marks in the same order, and data
    parallel ranks wait for each other in the backward, where whoever still computes a window has one mark less.
    Segments run are counted too, but only as signs of life: a rank whose window or validation is long, because its
    documents are, moves all the time. Nobody is at fault for standing still in the first window, where kernels are
    compiled, nor while a checkpoint is written. Where ranks wait for each other inside a window (one document over many
    ranks, sharded weights) all of them stand at one mark, and it can only be said which stood first.

    Args:
        timeout: seconds; longer than any one segment or update takes.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.interval = timeout, min(1.0, timeout / 5)
        self.line: str | None = None
        self._thread: threading.Thread | None = None
        self._board: Hub | Link
        self._children: list[Any] = []  # processes that Lightning has started here
        self._wake, self._found, self._taken = threading.Event(), threading.Event(), threading.Event()
        self._row, self._warm, self._listens = Row(), False, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the board and begin to watch. Raises: UserError if rank 0 cannot be reached."""
        if trainer.world_size == 1 or self._thread:
            return
        strategy: Any = trainer.strategy
        rank, hub = trainer.global_rank, None
        if rank == 0:
            hub = Hub(trainer.world_size, self.timeout)
        place = (strategy.cluster_environment.main_address, hub.port, hub.token) if hub else None
        host, port, token = strategy.broadcast(place)
        try:
            self._board = hub or Link(rank, host, port, token, self.timeout, self.interval)
        except OSError as error:
            raise UserError(
                f"rank {rank} cannot reach rank 0's board at {host}:{port}: {error}; open the ports between the nodes"
            ) from None
        self._adopt(strategy.launcher)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hear of each segment from now on."""
        self._listen(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hear of each segment from now on."""
        self._listen(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A mark."""
        self._mark(f"window {batch_idx}")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        """A mark."""
        self._mark(self._row.place and f"the backward of {self._row.place}")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """A mark."""
        self._mark(self._row.place and self._row.place.replace("backward of", "update after"))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A mark."""
        self._warm = True
        self._mark(f"what follows window {batch_idx}")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A mark."""
        self._mark(f"window {batch_idx} of validation")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A mark."""
        self._warm = True
        self._mark(f"what follows window {batch_idx} of validation")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Rank 0 is about to write, for as long as it takes."""
        self._row = self._row._replace(place="")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What comes now is the last checkpoint."""
        self._row = self._row._replace(place="")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say that all went well; rank 0 keeps the board until everybody has."""
        self._end("", self.timeout)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others. Raises: UserError in place of a collective's error if that comes of another rank's end."""
        if self._thread is None:
            return
        if isinstance(exception, RuntimeError) and not isinstance(exception, torch.OutOfMemoryError):
            self._row = self._row._replace(suspects=True)
            self._wake.set()
            if self._found.wait(PATIENCE_SECONDS):
                self._taken.set()
                self._leave()
                raise UserError(self.line) from None
        self._taken.set()
        text = (str(exception).splitlines() or [type(exception).__name__])[0][:500]
        stopped = not isinstance(exception, Exception)
        self._end("was stopped by a signal" if stopped else f"ended with an error: {text}", PATIENCE_SECONDS)

    def _mark(self, place: str) -> None:
        self._row = self._row._replace(marks=self._row.marks + 1, place=place if self._warm else "")

    def _listen(self, pl_module: Any) -> None:
        def pulse(*_: Any) -> None:
            self._row = self._row._replace(pulses=self._row.pulses + 1)

        if self._thread and not self._listens:
            pl_module.model.blocks[0].register_forward_pre_hook(pulse)
            self._listens = True

    def _adopt(self, launcher: Any) -> None:
        """Take over from Lightning's observer: it kills this process too when a child dies, before a word is said."""
        observed = getattr(launcher, "procs", [])
        self._children = list(observed)
        if observed:
            launcher.procs = list(observed)
            observed.clear()

    def _run(self) -> None:
        """The thread. Its clock does not count time in which this process was suspended."""
        clock, beat, last = 0.0, 0, time.monotonic()
        while True:
            self._wake.clear()
            now, beat = time.monotonic(), beat + 1
            clock, last = clock + min(now - last, 3 * self.interval), now
            row = self._row._replace(beat=beat)
            if (line := self._board.tick(row, clock)) is not None:
                self._found_line(line)
                return
            if row.end is not None and self._board.closes():
                return
            self._wake.wait(self.interval)

    def _found_line(self, line: str) -> None:
        self.line = line
        self._found.set()
        if self._taken.wait(GRACE_SECONDS):
            return
        print(f"infctx: error: {line}", file=sys.stderr, flush=True)
        self._leave()
        os._exit(1)

    def _end(self, how: str, seconds: float) -> None:
        if self._thread is None:
            return
        self._row = self._row._replace(end=how, place="")
        self._wake.set()
        self._thread.join(seconds)
        if how:
            self._leave()
        self._board.close()
        self._thread = None

    def _leave(self) -> None:
        """End badly: the others read the verdict first, and no child is left behind, not even a stopped one."""
        if isinstance(self._board, Hub):
            time.sleep(2 * self.interval)
        for child in self._children:
            child.kill()
