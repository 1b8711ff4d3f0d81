"""Which parameters are trained, and how: parts of a model by patterns of the published names."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """The parameters whose names match a pattern; of several such parts, the last one counts.

    Args:
        match: a name, or a pattern with * and ?, such as blocks.*.att.*.
        train: false: they stay as they are.
        lr: learning rate at its highest; null: that of the optimizer.
        weight_decay: of the matrices among them; null: that of the optimizer.
    """

    match: str
    train: bool = True
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay"):
            value = getattr(self, key)
            if value is not None and (value < 0 or not self.train):
                why = f"must not be below 0, got {value}" if self.train else "is given, and train is false"
                raise ValueError(f"model.parts, match {self.match!r}: {key} {why}")


class Group(NamedTuple):
    """What is the same for the parameters of a group of the optimizer."""

    kind: str  # matrices; rest; double and triple: at so many times the rate, as in RWKV-LM
    part: int  # of the list, that the names match; -1: none

    @property
    def factor(self) -> float:
        """Of the rate."""
        return {"double": 2.0, "triple": 3.0}.get(self.kind, 1.0)


def part_of(name: str, parts: tuple[Part, ...]) -> int:
    """The last one that a name matches; -1: none."""
    return max((i for i, part in enumerate(parts) if fnmatchcase(name, part.match)), default=-1)


def freeze(model: nn.Module, parts: tuple[Part, ...]) -> None:
    """Train no parameter of a part with train: false.

    Raises: ValueError for a pattern that no name matches, one given twice, or if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for i, part in enumerate(parts):
        if not any(fnmatchcase(name, part.match) for name in names):
            raise ValueError(f"model.parts, match {part.match!r}: no parameter is named so; there are {_few(names)}")
        if any(part.match == other.match for other in parts[:i]):
            raise ValueError(f"model.parts, match {part.match!r} is there twice")
    for name, p in model.named_parameters():
        index = part_of(name, parts)
        if index >= 0 and not parts[index].train:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model.parts: no parameter is left to train")


def grouped(model: nn.Module, parts: tuple[Part, ...]) -> dict[Group, list[nn.Parameter]]:
    """What is trained, in groups."""
    scale = {  # a mixer names its decay base so
        id(getattr(module, name)): factor
        for module in model.modules()
        for name, factor in getattr(module, "lr_scale", {}).items()
        if hasattr(module, name)
    }
    groups: dict[Group, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = name.endswith(".weight") and sum(n != 1 for n in p.shape) >= 2
            kind = {2.0: "double", 3.0: "triple"}.get(scale.get(id(p), 1.0), "matrices" if matrix else "rest")
            groups.setdefault(Group(kind, part_of(name, parts)), []).append(p)
    order = ("matrices", "rest", "double", "triple")
    return dict(sorted(groups.items(), key=lambda x: (x[0].part, order.index(x[0].kind))))


def table(model: nn.Module, groups: Iterable[dict[str, Any]]) -> str:
    """What is trained, and how, a line for each group of the optimizer; and what is not."""
    names = {id(p): name for name, p in model.named_parameters()}
    lines = [f"{'trained':<24}{'tensors':>8}{'parameters':>16}{'lr':>10}{'decay':>8}  names"]
    for group in groups:
        params = group["params"]
        lines.append(
            f"{group['name']:<24}{len(params):>8}{_numel(params):>16,}{group['initial_lr']:>10.2g}"
            f"{group['weight_decay']:>8.2g}  {_few([names[id(p)] for p in params])}"
        )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        own = _few([names[id(p)] for p in frozen])
        lines.append(f"{'as they are':<24}{len(frozen):>8}{_numel(frozen):>16,}{'':>18}  {own}")
    return "\n".join(lines)


def _numel(params: list[nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in params)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class Silent:
    """Parameters that have had no gradient: a warning says which, after some steps."""

    STEPS = 10  # low-rank pairs begin with one of them at zero, and the other has a gradient a step later

    def __init__(self) -> None:
        self.names: list[str] | None = None  # not the tensors: an engine may put others, in pieces, in their place
        self.steps = 0

    def look(self, model: nn.Module) -> str | None:
        """Before an optimizer step. Returns: the warning, when it is due."""
        if self.steps == self.STEPS:
            return None
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = list(trained) if self.names is None else self.names
        had = _any([p.grad for p in (trained[name] for name in names)])
        self.names = [name for name, some in zip(names, had, strict=True) if not some]
        self.steps += 1
        if self.steps < self.STEPS or not self.names:
            return None
        return f"no gradient in the first {self.STEPS} steps, so nothing was learnt: {_few(self.names)}"


def _any(grads: list[Tensor | None]) -> list[bool]:
    """Which gradients have a number that is not 0, on any rank where they lie in pieces."""
    present: list[Any] = [g for g in grads if g is not None]
    if not present:
        return [False] * len(grads)
    cut = hasattr(present[0], "to_local")  # a DTensor, whose type takes seconds to import
    found = torch.stack([(g.to_local() if cut else g).any() for g in present]).int()
    if cut:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    flags = iter(found.tolist())
    return [g is not None and bool(next(flags)) for g in grads]
