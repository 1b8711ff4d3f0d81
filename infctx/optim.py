"""Which parameter learns how fast: groups, optimizer, schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated.

    Args:
        name: adamw.
        lr: learning rate at its highest, per optimizer step.
        betas: decay of the two moments, per optimizer step.
        eps: added to the root of the second moment.
        weight_decay: of matrices only: embedding, head, and those of both mixers, but not their low-rank parts.
        schedule: cosine: from lr to final_lr over the run; constant.
        warmup_steps: optimizer steps over which the rate rises to lr: (i + 1) / warmup_steps of it at step i.
        final_lr: where cosine ends; null: a tenth of lr.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-18
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    final_lr: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"model.optimizer.lr must be above 0, got {self.lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"model.optimizer.warmup_steps must be at least 0, got {self.warmup_steps}")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters as matrices (decayed), the rest, and what learns at 2 or 3 times the rate, as in RWKV-LM."""
    scale = {  # a mixer names its decay base so
        id(getattr(module, name)): factor
        for module in model.modules()
        for name, factor in getattr(module, "lr_scale", {}).items()
        if hasattr(module, name)
    }
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "rest": [], "double": [], "triple": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = "matrices" if name.endswith(".weight") and sum(n != 1 for n in p.shape) >= 2 else "rest"
            groups[{2.0: "double", 3.0: "triple"}.get(scale.get(id(p), 1.0), matrix)].append(p)
    return [{"name": name, "params": params, **_numbers(name, config)} for name, params in groups.items() if params]


def _numbers(name: str, config: OptimizerConfig) -> dict[str, float]:
    """What a group has of its own."""
    factor = {"double": 2.0, "triple": 3.0}.get(name, 1.0)
    return {"weight_decay": config.weight_decay if name == "matrices" else 0.0, "lr": config.lr * factor}


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the groups. Not the fused one: under bf16-mixed Lightning refuses to clip gradients before it."""
    return AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps)


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Step it once after each optimizer step; it holds its floor past `total_steps`."""
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps))


def apply_config(optimizer: Any, schedule: Any, config: OptimizerConfig) -> None:
    """Give an optimizer and its schedule, restored from a checkpoint, the numbers of the recipe as it is now."""
    for i, group in enumerate(optimizer.param_groups):
        new = _numbers(group["name"], config)
        rate = new["lr"] * schedule.lr_lambdas[i](schedule.last_epoch)
        numbers = {"betas": config.betas, "eps": config.eps, "weight_decay": new["weight_decay"]}
        group.update(numbers, lr=rate, initial_lr=new["lr"])
        schedule.base_lrs[i] = new["lr"]


def learning_rate_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """What the rate of each group is multiplied by at step i, from 0."""
    floor = (config.lr / 10 if config.final_lr is None else config.final_lr) / config.lr

    def factor(i: int) -> float:
        if i < config.warmup_steps:
            return (i + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (i - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def total_norm(model: nn.Module) -> float:
    """The 2-norm of all gradients together."""
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # gradients in pieces over ranks
