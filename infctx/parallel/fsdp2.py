"""Lightning's strategy for FSDP2, on GPUs and on CPUs."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from infctx.parallel.cut import Cut
from infctx.parallel.pieces import cut_like, cut_model, whole
from infctx.parallel.sharded import runner


class FSDP2(Cut, ModelParallelStrategy):
    """Weights, gradients and moments in pieces, by torch itself: one layer at a time is whole.

    Under bf16-mixed layers are put together and computed in bfloat16; gradients are summed over the ranks in float32.
    """

    in_pieces = True

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1)
        self.runner = runner(self)

    def setup_environment(self) -> None:
        """All ranks cut up one model."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Without the hook of the module that Lightning asks for: the model is cut up here."""
        Strategy.setup(self, trainer)

    def model_to_device(self) -> None:
        """Layer by layer, when they are cut up."""

    def _setup_model(self, model: Any) -> Any:
        low = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        cut_model(model.model, self.device_mesh["data_parallel"], low)
        return model

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Without autocast, which would keep whole copies of all weights. Gradients of the step before go first."""
        assert self.lightning_module is not None
        if args[1] % self.lightning_module.trainer.accumulate_grad_batches == 0:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return self.lightning_module.training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Without autocast, as training."""
        return self.lightning_module.validation_step(*args, **kwargs)

    def forward(self, part: Callable[..., Any], *args: Any) -> Any:
        """See `sharded.Engine`."""
        return part(*args)

    def backward_segment(self, total: Tensor) -> None:
        """See `sharded.Engine`."""
        total.backward()

    def last(self) -> None:
        """See `sharded.Engine`."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, each on the rank that owns it."""
        state = self.lightning_module.state_dict()
        found = {name: whole(p, mine) for (name, p), mine in zip(state.items(), self.own(state.values()), strict=True)}
        return {name: x for name, x in found.items() if x is not None}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole moments, each on the rank that owns the weight."""
        given: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        own = self.own(p for group in optimizer.param_groups for p in group["params"])
        state: dict[int, dict[str, Any]] = {}
        for i, kept in given["state"].items():
            found = {key: whole(x, own[i]) for key, x in kept.items()}
            state |= {i: found} if own[i] else {}
        return {**given, "state": state}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The moments, of which each rank takes its pieces."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            state = {i: {key: cut_like(x, params[i]) for key, x in own.items()} for i, own in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})
