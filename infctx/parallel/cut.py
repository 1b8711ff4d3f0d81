"""What strategies have in common whose engine cuts up what is trained: see `zero` and `fsdp2`.

The engine knows single micro-steps, Lightning counts the accumulated windows: so a short last group makes a step too.
Weights are loaded before they are cut up: they are those that one rank would have. Checkpoints hold whole tensors in
the layout of one rank, dealt out over the ranks that write them, and any strategy goes on from them on any number of
ranks.
"""

import heapq
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn

from infctx.bptt import Runner
from infctx.parallel.sharded import Outline


class Cut:
    """What Lightning and the module ask of a strategy that cuts up what is trained."""

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    runner: Runner
    in_pieces: bool  # the weights are, or only what is kept about them
    lightning_module: Any

    def outline(self, model: Any) -> Outline | None:
        """Of a model whose weights will be in pieces."""
        return Outline(model, self.root_device) if self.in_pieces else None  # type: ignore[attr-defined]

    @property
    def ranks(self) -> int:
        """By which the engine divides gradients."""
        return self.world_size  # type: ignore[attr-defined]

    def block_backward_sync(self) -> Any:
        """Nothing: the strategy itself knows which windows are accumulated."""
        return nullcontext()

    def own(self, parameters: Iterable[nn.Parameter]) -> list[bool]:
        """Which of them, whole, this rank keeps and writes when a checkpoint is saved."""
        sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        return [rank == self.global_rank for rank in deal(sizes, self.ranks)]  # type: ignore[attr-defined]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every rank writes the tensors that it owns."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, {"together": True})  # type: ignore[attr-defined]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads all of it."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)  # type: ignore[arg-type]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into the weights, which are whole yet."""
        Strategy.load_model_state_dict(self, checkpoint, strict)  # type: ignore[arg-type]


def deal(sizes: list[int], ranks: int) -> list[int]:
    """A rank for each of several tensors, so that all get about as many numbers: the largest first."""
    loads, dealt = [(0, rank) for rank in range(ranks)], [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, dealt[i] = loads[0]
        heapq.heapreplace(loads, (load + sizes[i], dealt[i]))
    return dealt
