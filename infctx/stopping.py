"""Control-C: a run stops after the optimizer step that is under way, and saves it."""

import os
import signal
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

HEARD = b"\nrun: stopping after this step; once more: at once\n"


class Stopping(Callback):
    """Hears the first SIGINT while a run trains; the next one does what it did before.

    Each rank hears it at another moment, or only one of them: they agree by the sums of the next optimizer step.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Listen from now on, unless a shell has this process ignore it, as one in the background."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
            return

        def ask(*_: Any) -> None:
            pl_module.asked_to_stop = True
            self._restore()
            if trainer.is_global_zero:
                os.write(2, HEARD)  # print might be under way already

        self._before = before
        signal.signal(signal.SIGINT, ask)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop where all ranks do: `Checkpoint`, which comes later, saves. Validation is made only where it is due."""
        if not pl_module.stops or trainer.should_stop:
            return
        loop = trainer.fit_loop.epoch_loop
        fetcher: Any = trainer.fit_loop._data_fetcher
        loop._skip_next_val = not loop._should_check_val_fx(fetcher)
        trainer.fit_loop.min_epochs, loop.min_steps = 0, None  # else Lightning would go on to them
        trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """All is saved."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The run has ended otherwise."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
