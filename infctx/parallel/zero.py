"""Lightning's strategy for DeepSpeed's ZeRO, on GPUs and on CPUs."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from infctx.bptt import run_alone
from infctx.parallel.cut import Cut
from infctx.parallel.enginestate import EngineState
from infctx.parallel.sharded import runner


class ZeRO(Cut, DeepSpeedStrategy):
    """DeepSpeed's ZeRO.

    Args:
        stage: what is in pieces: 1: the optimizer's moments and float32 weights; 2: gradients too; 3: weights too.
        offload: moments and float32 weights lie in the host's memory and are updated there; in stage 3 the pieces of
            the weights lie there too.
        options: further keys of DeepSpeed's section zero_optimization.
    """

    handles_gradient_accumulation = False

    def __init__(
        self, stage: Literal[1, 2, 3] = 2, offload: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        zero: dict[str, Any] = {"stage": stage}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero | (options or {}),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's needs no compiler
            "data_types": {"grad_accum_dtype": "fp32"},  # sums of hundreds of bfloat16 terms stand still
        }
        super().__init__(config=config, logging_level=logging.ERROR)
        self.in_pieces = stage == 3
        self.runner = runner(self) if stage == 3 else run_alone

    @property
    def engine(self) -> Any:
        """DeepSpeed's."""
        return self.model

    @property
    def root_device(self) -> torch.device:
        """With an index on CPUs too: DeepSpeed compares it."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup(self, trainer: Any) -> None:
        """Without the warning that DeepSpeed clips gradients itself: so it does."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping")
            super().setup(trainer)

    def setup_environment(self) -> None:
        """As Lightning's, which refuses CPUs."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As Lightning's, which refuses CPUs. Raises: ValueError if DeepSpeed has chosen other devices."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        from deepspeed import ops
        from deepspeed.accelerator import get_accelerator

        found = get_accelerator().device_name()
        if not found.startswith("cpu"):
            raise ValueError(f"trainer.accelerator cpu: DeepSpeed takes {found} on this machine: set it to auto")
        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled first, for half a minute
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_batch_size_and_grad_accum_config(self) -> None:
        super()._format_batch_size_and_grad_accum_config()
        assert isinstance(self.config, dict)
        self.config["gradient_accumulation_steps"] = 1  # the boundary is set with each window

    def _setup_model(self, model: Any) -> Any:
        if self.in_pieces:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [type(model.model.blocks[0])])
            if model.model.config.arch != "rwkv7a":
                for block in model.model.blocks:
                    block.register_forward_pre_hook(_drop_embedded)
        return model

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        if self.in_pieces:
            self._cut(model)
        super()._initialize_deepspeed_inference(model)
        if self.in_pieces:
            self._reach(model)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        from deepspeed import utils

        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.state = EngineState(utils, groups, self.in_pieces, self.global_rank)
        low = self.precision_plugin.precision != "32-true"
        exact = [(p, p.data) for p in self.state.parameters() if low]
        if self.in_pieces:
            self._cut(model)
        made = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self.in_pieces:
            self._reach(model)
        self.state.optimizer = made[0].optimizer
        for p, value in exact:
            self.state.write(p, value)  # DeepSpeed takes the float32 weights from those it has rounded
        return made

    def _cut(self, model: Any) -> None:
        """Before DeepSpeed would move the whole model to the device."""
        from deepspeed import zero

        if self.precision_plugin.precision != "32-true":
            model.to(torch.bfloat16)
        zero.Init(module=model, config_dict_or_path=self.config)

    def _reach(self, model: Any) -> None:
        """Have whole during a segment what is used outside the call of the module that it lies in."""
        from deepspeed import zero

        net = model.model
        outside = [net.head.weight, *net.blocks[0].ln0.parameters()]
        if net.config.n_gold:
            outside += [net.emb.weight, net.w_kv_cache_b.weight]
        for p in outside:
            zero.register_external_parameter(model, p)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """With the engine told whether the window is the last of its step."""
        done = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.engine.set_gradient_accumulation_boundary(done and not self.in_pieces)
        if not self.in_pieces:
            return super().training_step(*args, **kwargs)
        self._done = done
        return self.lightning_module.training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Through the engine, by whole windows or by segments."""
        if not self.in_pieces:
            return super().validation_step(*args, **kwargs)
        return self.lightning_module.validation_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Note the norm of the gradient, which the engine takes, before clipping."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        norm = float(self.engine.get_global_grad_norm())
        self.lightning_module.note_norm(norm if self.engine.was_step_applied() else float("inf"))
        return result

    def forward(self, part: Callable[..., Any], *args: Any) -> Any:
        """See `sharded.Engine`."""
        return self.engine(part, *args)

    def backward_segment(self, total: Tensor) -> None:
        """See `sharded.Engine`."""
        self.engine.backward(total)

    def last(self) -> None:
        """See `sharded.Engine`."""
        self.engine.set_gradient_accumulation_boundary(self._done)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole float32 weights, each on the rank that owns it."""
        from deepspeed import zero

        state = {}
        named = dict(self.lightning_module.named_parameters())
        for (name, p), mine in zip(named.items(), self.own(named.values()), strict=True):
            with zero.GatheredParameters([p], enabled=self.in_pieces and not p.requires_grad):
                x = self.state.weight(p) if p.requires_grad else p
                if mine:
                    state[name] = x.detach().float().cpu().clone()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole moments, each on the rank that owns the weight."""
        return self.state.moments(self.own(self.state.parameters()))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The moments, of which each rank takes its pieces."""
        self.state.load(checkpoint["optimizer_states"][0])


def _drop_embedded(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Only RWKV-7a's layers read it; DeepSpeed would wait for its gradient before it lets go of a layer's weights."""
    x, shared, *rest = args
    return x, shared._replace(embedded=shared.embedded.detach()), *rest
