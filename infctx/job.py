"""What the memory and the time of a training step depend on.

B lanes, S segments of T tokens.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from infctx.borders import StatesConfig
from infctx.config import ModelConfig
from infctx.models.rwkv import RWKV
from infctx.parts import Part, freeze
from infctx.tuning.config import Tuning
from infctx.tuning.tune import apply_tuning


@dataclass(frozen=True)
class Job:
    """What the memory of a step depends on.

    Args:
        config: sizes of the model. lanes: B. segment_length: T. segments: S of the longest window.
        horizon, states: as the recipe has them.
        precision: fp32; bf16-mixed: float32 weights under autocast; bf16: weights in bfloat16.
        kernel: backend of the recurrence. device: cuda or cpu. multiprocessors: of the device, 0 for a CPU.
        time: ranks among which the segments of a window are dealt out.
        tuning, parts: what is trained; as the recipe has them. optimizer: its name.
    """

    config: ModelConfig
    lanes: int
    segment_length: int
    segments: int
    horizon: int | None = None
    states: StatesConfig = StatesConfig()  # noqa: RUF009 (frozen)
    precision: str = "fp32"
    kernel: str = "auto"
    device: str = "cpu"
    multiprocessors: int = 0
    time: int = 1
    tuning: Tuning | None = None
    parts: tuple[Part, ...] = ()
    optimizer: str = "adamw"

    def outline(self) -> RWKV:
        """The model with what is tuned, and what is frozen so, without contents. Raises: ValueError if it has not."""
        with torch.device("meta"):
            model, tuning = RWKV(self.config), self.tuning
            if tuning is not None:  # pissa is lora with other numbers
                method = "lora" if tuning.method == "pissa" else tuning.method
                tuning = replace(tuning, method=method, start=None)
            freeze(model, (*(apply_tuning(model, tuning) if tuning else ()), *self.parts))
        return model

    @property
    def alike(self) -> bool:
        """Whether the layers are, but for the first and the last one."""
        named = [part.match for part in self.parts] + ([] if self.tuning is None else self.tuning.targets)
        return not self.config.n_gold and not any(re.search(r"blocks\.\W*\d", x) for x in named)

    @property
    def reach(self) -> int:
        """Segments under one gradient."""
        return min(self.horizon or self.segments, self.segments)

    @property
    def border_rows(self) -> int:
        """States of all lanes in memory at a time: those kept, those between two kept ones, the one worked on."""
        length = self.states.block(self.reach, self.time)
        return -(-(-(-self.reach // length) + length) // self.time) + 1

    @property
    def forwards(self) -> float:
        """Segments that pass 1 runs, over all of them: see `bptt.Gradient.window`."""
        done, length = 0, self.states.block(self.reach, self.time)
        for begin in range(0, self.segments, self.reach):
            group = min(self.reach, self.segments - begin)
            blocks = -(-group // length)
            done += (blocks - 1) * length + group - blocks
        return done / self.segments


def require_steps(trainer: Any) -> None:
    """Refuse a run without optimizer steps. Args: trainer: Lightning's, or the section `trainer` of a recipe.

    Raises: ValueError that names the key.
    """
    if trainer.accumulate_grad_batches < 1:
        got = trainer.accumulate_grad_batches
        raise ValueError(f"trainer.accumulate_grad_batches must be at least 1 window, got {got}")
    if trainer.limit_train_batches is not None and trainer.limit_train_batches <= 0:
        got = trainer.limit_train_batches
        raise ValueError(f"trainer.limit_train_batches must be above 0, or null for all windows, got {got}")
    for key in ("max_epochs", "max_steps"):
        if getattr(trainer, key) == 0:
            raise ValueError(f"trainer.{key} 0: there would be nothing to learn from: set at least 1")
