"""What a run is refused for, in a sentence with the mend."""

from typing import NoReturn

import torch
from torch import Tensor

from infctx.segments import Window


def refuse_strategy(name: str) -> NoReturn:
    """Raises: ValueError, always."""
    raise ValueError(f"trainer.strategy {name} is not supported: choose auto, ddp or a file of recipes/strategy")


def refuse_optimizer(name: str) -> None:
    """Raises: ValueError for one that does not work on pieces."""
    if name != "adamw":
        mend = "choose adamw, or trainer.strategy ddp"
        raise ValueError(f"model.optimizer.name {name}: DeepSpeed and FSDP2 cut up what it updates whole: {mend}")


def refuse_precision(precision: object) -> None:
    """Weights in float32, computed in it or in bfloat16. Raises: ValueError for others.

    The loss scale of float16 would reach a part of the gradient; weights in bfloat16 lose small updates.
    """
    if str(precision) not in ("None", "32", "32-true", "bf16", "bf16-mixed"):
        raise ValueError(f"trainer.precision {precision} is not supported: choose bf16-mixed or 32-true")


def refuse_non_finite(loss: Tensor, metrics: dict[str, Tensor], window: Window, index: int) -> None:
    """Raises: FloatingPointError that names the documents."""
    if torch.isfinite(loss):
        return
    bad = (~torch.isfinite(metrics["segment_loss"])).nonzero().flatten().tolist()
    segment = bad[0] if bad else 0
    documents = sorted(set(window.ids[:, segment].flatten().tolist()) - {-1})
    where = f"window {index}, segment {segment}, documents {documents[:5]}"
    mend = "no update was made from it; lower model.optimizer.lr or look at these documents"
    raise FloatingPointError(f"the loss is {loss.item()} in {where}: {mend}")
