"""How fast what is trained learns: optimizers and schedules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from infctx.parts import Group, Part, grouped


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated.

    Args:
        name: adamw; adamw8bit: its moments in 8 bits, by the bitsandbytes library; muon: torch's Muon for the matrices
            of the layers, at AdamW's rates, and AdamW for the rest.
        lr: learning rate at its highest, per optimizer step.
        betas: decay of the two moments, per optimizer step.
        eps: added to the root of the second moment; at least 1e-8 in adamw8bit, whose moments may be rounded to 0.
        weight_decay: of matrices only: embedding, head, and those of both mixers, but not their low-rank parts.
        schedule: from lr to final_lr over the run: cosine, linear; wsd: at lr, and linear to final_lr at the end;
            constant.
        unit: what the schedule goes by: optimizer steps; or tokens: those read before a step, of all that a run reads,
            so that windows of many tokens count for more than windows of few.
        warmup_steps: optimizer steps over which the rate rises to lr: (i + 1) / warmup_steps of it at step i.
        warmup_tokens: in its place with unit tokens: read at the end of step i over warmup_tokens of it.
        final_lr: where the schedule ends; null: a tenth of lr.
        decay_share: of the run, in which wsd goes to final_lr.
    """

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-18
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    unit: Literal["steps", "tokens"] = "steps"
    warmup_steps: int = 0
    warmup_tokens: int | None = None
    final_lr: float | None = None
    decay_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"model.optimizer.lr must be above 0, got {self.lr}")
        for key in ("warmup_steps", "warmup_tokens", "weight_decay", "final_lr"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"model.optimizer.{key} must be at least 0, got {getattr(self, key)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"model.optimizer.betas must be at least 0 and below 1, got {list(self.betas)}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"model.optimizer.decay_share must be above 0 and at most 1, got {self.decay_share}")
        if self.warmup_steps and self.warmup_tokens is not None:
            raise ValueError("model.optimizer: warmup_steps and warmup_tokens are both given: leave out one of them")
        if self.unit == "steps" and self.warmup_tokens is not None:
            raise ValueError("model.optimizer.warmup_tokens: set model.optimizer.unit to tokens, or give warmup_steps")
        if self.unit == "tokens" and self.warmup_steps:
            raise ValueError("model.optimizer.warmup_steps: model.optimizer.unit is tokens: give warmup_tokens")


def parameter_groups(model: nn.Module, config: OptimizerConfig, parts: tuple[Part, ...] = ()) -> list[dict[str, Any]]:
    """What is trained, in groups that have a name, a rate and a weight decay."""
    groups = grouped(model, parts)
    return [{"name": _name(g, parts), "params": params, **_numbers(g, config, parts)} for g, params in groups.items()]


def _name(group: Group, parts: tuple[Part, ...]) -> str:
    return group.kind if group.part < 0 else f"{group.kind} of {parts[group.part].match}"


def _numbers(group: Group, config: OptimizerConfig, parts: tuple[Part, ...]) -> dict[str, Any]:
    """What a group has of its own."""
    part = parts[group.part] if group.part >= 0 else Part("*")
    lr = config.lr if part.lr is None else part.lr
    decay = config.weight_decay if part.weight_decay is None else part.weight_decay
    decayed = decay if group.kind == "matrices" else 0.0
    return {"weight_decay": decayed, "lr": lr * group.factor, "own": tuple(group)}


def make_optimizer(model: nn.Module, config: OptimizerConfig, parts: tuple[Part, ...] = ()) -> Optimizer:
    """The one that a recipe names, over the groups. Raises: ValueError if its library is not installed."""
    groups = parameter_groups(model, config, parts)
    if config.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("model.optimizer.name adamw8bit: pip install bitsandbytes") from None
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=max(config.eps, 1e-8))
    if config.name == "muon":
        return _muon(model, groups, config)
    return _adamw(groups, config)


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


def _muon(model: nn.Module, groups: list[dict[str, Any]], config: OptimizerConfig) -> "Together":
    """Muon's updates are made as large as AdamW's: rates and weight decays mean the same for both."""
    linear = {id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"}
    inner, outer = list[dict[str, Any]](), list[dict[str, Any]]()
    for group in groups:
        for chosen, inside in ((inner, True), (outer, False)):
            params = [p for p in group["params"] if (id(p) in linear) == inside]
            if params:
                chosen.append({**group, "params": params, "name": f"{group['name']}{' by muon' * inside}"})
    made: list[Optimizer] = [_adamw(outer, config)] if outer else []
    if inner:
        made.insert(0, torch.optim.Muon(inner, lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    return Together(made)


class Together(Optimizer):
    """Several optimizers as one, with the groups and the states of all."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for x in optimizers for group in x.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for x in self.optimizers:
            x.state, x.param_groups = self.state, [next(groups) for _ in x.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Of each of them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for x in self.optimizers:
            x.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, course: Sequence[int]) -> LambdaLR:
    """Step it once after each optimizer step; it holds its floor past the end of the course."""
    return LambdaLR(optimizer, learning_rate_factor(config, course))


def warmup_left(config: OptimizerConfig, course: Sequence[int]) -> str | None:
    """A line for a run that ends before its rate is as high as the recipe says. Args: course: as below."""
    key = "warmup_steps" if config.warmup_tokens is None else "warmup_tokens"
    warmup, end = getattr(config, key), int(course[-1])
    if end >= warmup:
        return None
    return (
        f"warning: model.optimizer.{key} {warmup:,}: the run ends within it, after {end:,} {config.unit}, and never "
        "comes to model.optimizer.lr"
    )


def apply_config(optimizer: Any, schedule: Any, config: OptimizerConfig, parts: tuple[Part, ...] = ()) -> None:
    """Give an optimizer and its schedule, restored from a checkpoint, the numbers of the recipe as it is now."""
    for i, group in enumerate(optimizer.param_groups):
        new = _numbers(Group(*group["own"]), config, parts)
        rate = new["lr"] * schedule.lr_lambdas[i](schedule.last_epoch)
        numbers = {"betas": config.betas, "eps": config.eps} if "betas" in group else {}
        group.update(numbers, lr=rate, initial_lr=new["lr"], weight_decay=new["weight_decay"])
        schedule.base_lrs[i] = new["lr"]


def learning_rate_factor(config: OptimizerConfig, course: Sequence[int]) -> Callable[[int], float]:
    """What the rate of each group is multiplied by at step i, from 0.

    Args: course: (steps + 1,) how far the run is before each step, and at its end, in the schedule's unit.
    """
    floor = (config.lr / 10 if config.final_lr is None else config.final_lr) / config.lr
    after = {
        "constant": lambda done: 1.0,
        "linear": lambda done: floor + (1 - floor) * (1 - done),
        "cosine": lambda done: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)),
        "wsd": lambda done: floor + (1 - floor) * min(1.0, (1 - done) / config.decay_share),
    }[config.schedule]

    warmup, end = config.warmup_tokens or config.warmup_steps, int(course[-1])

    def factor(i: int) -> float:
        before, behind = (int(course[min(at, len(course) - 1)]) for at in (i, i + 1))
        if before < warmup:
            return min(1.0, behind / warmup)
        return after(min(1.0, (before - warmup) / max(1, end - warmup)))

    return factor


def total_norm(model: nn.Module) -> float:
    """The 2-norm of all gradients together."""
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # gradients in pieces over ranks
