"""A model with what a recipe tunes."""

from typing import Any

from infctx.parts import Part
from infctx.state import SHIFT_STATE, TIME_STATE
from infctx.tuning.adapters import add_adapter, peft_config
from infctx.tuning.config import Tuning
from infctx.tuning.states import add_state


def apply_tuning(model: Any, tuning: Tuning) -> tuple[Part, ...]:
    """Give a model what is tuned. Returns: the parts that train that and nothing else.

    Raises: ValueError for what the model has not, or a state unfit to begin with.
    """
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = [Part("*", train=False)]
    if tuning.adapter:
        add_adapter(model, peft_config(model, tuning))
        parts += [Part(name, lr=tuning.lr) for name in _added(model, own)]
    if tuning.learns_state:
        add_state(model, tuning)
        lr = tuning.state_lr if tuning.adapter else tuning.lr
        parts += [Part(f"blocks.*.{name}", lr=lr) for name in (TIME_STATE, *([SHIFT_STATE] * tuning.shift))]
    return tuple(parts)


def _added(model: Any, own: set[str]) -> list[str]:
    """Patterns of the names of an adapter's parameters: *.lora_A.default.weight."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and name not in own]
    kinds = {".".join(name.split(".")[4:]) for name in names}  # behind blocks.N.att.key
    return [f"blocks.*.{kind}" for kind in sorted(kinds)]
