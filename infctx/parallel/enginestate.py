"""What a DeepSpeed engine keeps of a model, as the whole tensors of checkpoints, numbered as torch's AdamW does."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from infctx.parallel.pieces import own_piece

MOMENTS = ("exp_avg", "exp_avg_sq")
_FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


class EngineState:
    """Float32 weights and moments; every method is called on all ranks.

    Args:
        utils: the module deepspeed.utils.
        groups: trained parameters in the order of the optimizer's groups.
        in_pieces: whether the weights are (stage 3).
        rank: this one.
    """

    def __init__(self, utils: Any, groups: list[list[nn.Parameter]], in_pieces: bool, rank: int) -> None:
        self.utils, self.groups, self.in_pieces, self.rank = utils, groups, in_pieces, rank
        self.optimizer: Any = None  # the engine's, when it is made

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained ones, in order."""
        return (p for group in self.groups for p in group)

    def weight(self, p: nn.Parameter) -> Tensor:
        """A whole float32 weight."""
        return self.utils.safe_get_full_fp32_param(p)

    def moments(self, own: list[bool]) -> dict[str, Any]:
        """As torch's `Optimizer.state_dict`, with the moments of those weights only that are this rank's own."""
        base, state, groups, count = self.optimizer.optimizer, dict[int, dict[str, Tensor]](), [], 0
        step = next(iter(base.state.values()))["step"]
        self._link()
        for given, params in zip(base.param_groups, self.groups, strict=True):
            groups.append({**_options(given), "params": list(range(count, count + len(params)))})
            for i, p in enumerate(params, count):
                for key in MOMENTS:  # one whole tensor at a time on the device
                    x = self.utils.safe_get_full_optimizer_state(p, key)
                    if own[i]:
                        state.setdefault(i, {"step": step.clone()})[key] = x.cpu()
            count += len(params)
        return {"state": state, "param_groups": groups}

    def load(self, saved: dict[str, Any]) -> None:
        """Take this rank's pieces of what `moments` gave on all ranks together."""
        base = self.optimizer.optimizer
        for group, given in zip(base.param_groups, saved["param_groups"], strict=True):
            group.update(_options(given))
        step = saved["state"][0]["step"]
        for flat in next(getattr(self.optimizer, name) for name in _FLAT if hasattr(self.optimizer, name)):
            base.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self._link()
        for i, p in enumerate(self.parameters()):
            for key in MOMENTS:
                self.write(p, saved["state"][i][key], key)

    def write(self, p: Any, value: Tensor, moment: str | None = None) -> None:
        """Set a float32 weight, or a moment of it, to a whole tensor that all ranks have."""
        key = () if moment is None else (moment,)
        if self.in_pieces:
            set_local = self.utils.safe_set_local_optimizer_state if key else self.utils.safe_set_local_fp32_param
            set_local(p, own_piece(value, self.rank, p.ds_tensor.numel()), *key)
        else:
            set_full = self.utils.safe_set_full_optimizer_state if key else self.utils.safe_set_full_fp32_param
            set_full(p, value, *key)

    def _link(self) -> None:
        """Find each weight's moments: DeepSpeed does so when only the first of several groups has any."""
        if not self.in_pieces:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
