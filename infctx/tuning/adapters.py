"""Adapters of the peft library inside the linear layers of a model."""

from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infctx.tuning.config import PRESETS, Tuning

PREFIX = "base_model.model."  # of names in peft's files
NAME = "default"  # peft's, of an adapter that is the only one


def peft() -> Any:
    """The library. Raises: ValueError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise ValueError("model.tuning: adapters are the peft library's: pip install peft") from None
    return peft


def peft_config(model: nn.Module, tuning: Tuning) -> Any:
    """Its configuration of an adapter. Raises: ValueError for layers or options that there are not."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    kind, options = PRESETS[tuning.method]
    config = CONFIGS[getattr(peft().PeftType, kind)]
    known = {x.name for x in fields(config)}
    alpha = tuning.rank if tuning.alpha is None else tuning.alpha
    given = {"r": tuning.rank, "lora_alpha": alpha, "alpha": alpha}
    given |= {f"{x}dropout": tuning.dropout for x in ("lora_", "miss_", "module_", "vera_", "randlora_")}
    given = {key: value for key, value in given.items() if key in known}
    if tuning.dropout and not any(key.endswith("dropout") for key in given):
        raise ValueError(f"model.tuning.dropout: method {tuning.method} has none")
    if odd := sorted(set(tuning.options) - known):
        raise ValueError(f"model.tuning.options: {odd[0]} is no option of peft's {config.__name__}")
    return config(**{**given, **options, **tuning.options, "target_modules": targets(model, tuning.targets)})


def targets(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the linear layers that patterns match.

    Raises: ValueError for a pattern that matches none, or one whose weight is read without a call of the layer.
    """
    linear = [name for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    for pattern in patterns:
        found = [name for name in linear if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"model.tuning.targets: no linear layer is named {pattern!r}; there are {linear[0]}, "
                             f"{linear[1]}, ...")  # fmt: skip
        if outside := [name for name in found if not name.startswith("blocks.")]:
            raise ValueError(f"model.tuning.targets: {outside[0]} can have no adapter; take layers of blocks.*")
    return [name for name in linear if any(fnmatchcase(name, pattern) for pattern in patterns)]


def add_adapter(model: nn.Module, config: Any) -> None:
    """Put adapters into a model; its own parameters are trained no more."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    peft().inject_adapter_in_model(config, model)
    tuned = sum(p.requires_grad for p in model.parameters())
    if not wanted or not tuned:
        raise ValueError("model.tuning: the adapters have nothing to train")


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, x) for name, x in model.named_modules() if isinstance(x, BaseTunerLayer))


def plain_name(name: str) -> str:
    """Of a weight that an adapter is around, as published."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to the weights, in float32 at least, and leave plain layers.

    Raises: ValueError if a weight would not be finite.
    """
    for name, layer in list(layers(model)):
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parent, _, last = name.rpartition(".")
        base = layer.get_base_layer()
        base.weight.data = base.weight.data.to(dtype)
        base.requires_grad_(True)
        setattr(model.get_submodule(parent), last, base)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters as peft's files: adapter_config.json, adapter_model.safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.peft_config[NAME]  # type: ignore[index]
    tensors: dict[str, Tensor] = peft().get_peft_model_state_dict(model)
    save_file({f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config.save_pretrained(folder)
