"""State tuning: the state before a document's first token is learnt, with the weights as they are."""

from pathlib import Path
from typing import Any

import torch

from infctx.state import SHIFT_STATE, TIME_STATE, State
from infctx.statefile import load_state, save_state
from infctx.tuning.config import Tuning


def add_state(model: Any, tuning: Tuning) -> None:
    """Make the initial state of a model something to learn. Raises: ValueError for a start unfit for it."""
    names = names_to_learn(model, tuning.shift)
    if missing := [name for name in names if name not in dict(model.named_parameters())]:
        model.add_states(missing)
    if tuning.start is not None:
        state, _ = load_state(tuning.start, model)
        begin_with(model, state, tuning)


def names_to_learn(model: Any, shift: bool) -> list[str]:
    """Of the parameters that the initial state is learnt as.

    GoldFinch's attention layers have no recurrence, and what their token shift begins with changes nothing: it enters
    the first token's query, and that token has one key to read.
    """
    names = []
    for i, block in enumerate(model.initial_state(1).blocks):
        att = (TIME_STATE, SHIFT_STATE) if shift else (TIME_STATE,)
        names += [f"blocks.{i}.att.{part}" for part in att if block.wkv.numel()]
        names += [f"blocks.{i}.ffn.{SHIFT_STATE}"] * shift
    return names


def export_state(model: Any, path: str) -> None:
    """Write the learnt initial state: .safetensors, or .pth with time_state as the community has it.

    Raises: ValueError if none was learnt, or the file cannot hold it.
    """
    learnt = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()} & {TIME_STATE, SHIFT_STATE}
    if not learnt:
        raise ValueError("no initial state was learnt: train with model.tuning {method: state}")
    if SHIFT_STATE in learnt and Path(path).suffix == ".pth":
        raise ValueError(f"{path}: a time_state file has no place for the token shifts: write a .safetensors file")
    save_state(model.initial_state(1), path, {"arch": model.config.arch})


@torch.no_grad()
def begin_with(model: Any, state: State, tuning: Tuning) -> None:
    """Set the learnt initial state. Raises: ValueError if a part of this one is not learnt, or it is of many."""
    if len(state.blocks[0].att_shift) != 1 or (state.memory is not None and len(state.memory.tokens)):
        raise ValueError(f"model.tuning.start {tuning.start}: give the state of one sequence, without remembered keys")
    shifted = any(bool(x.any()) for block in state.blocks for x in block[:2])
    if shifted and not tuning.shift:
        raise ValueError(f"model.tuning.start {tuning.start}: its token shifts are not zeros: set model.tuning.shift")
    parameters = dict(model.named_parameters())
    for i, block in enumerate(state.blocks):
        values = {f"att.{SHIFT_STATE}": block.att_shift, f"ffn.{SHIFT_STATE}": block.ffn_shift,
                  f"att.{TIME_STATE}": block.wkv}  # fmt: skip
        for name, value in values.items():
            if (p := parameters.get(f"blocks.{i}.{name}")) is not None:
                p.copy_(_reachable(value[0]))


def _reachable(wkv: torch.Tensor) -> torch.Tensor:
    """RWKV-4's state of nothing has an exponent at which no number is left; nothing is nothing at any."""
    if wkv.dim() == 2 and bool((wkv[2] < -1e30).all()):
        return torch.zeros_like(wkv)
    return wkv
