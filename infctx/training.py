"""The model section of a recipe, as Lightning sees it: one window in, one loss out, one backward."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from infctx.borders import StatesConfig
from infctx.bptt import Runner, run_alone, window_loss
from infctx.config import ModelConfig
from infctx.job import require_steps
from infctx.lanes import Place
from infctx.models.rwkv import init_model
from infctx.ops.backends import choose, require_known
from infctx.optim import OptimizerConfig, apply_config, make_optimizer, make_schedule, total_norm, warmup_left
from infctx.parallel.config import ParallelConfig
from infctx.parallel.cut import Cut
from infctx.parallel.fsdp2 import FSDP2
from infctx.parallel.scan import Scan
from infctx.parallel.sharded import Outline
from infctx.parallel.wavefront import Wavefront
from infctx.parallel.zero import ZeRO
from infctx.parts import Group, Part, Silent, freeze, table
from infctx.refusals import refuse_non_finite, refuse_optimizer, refuse_precision, refuse_strategy
from infctx.segments import Window
from infctx.state import State
from infctx.task import by_distance
from infctx.tuning.base import Base, require_trained
from infctx.tuning.config import Tuning
from infctx.tuning.tune import apply_tuning
from infctx.weights import load_model

STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ZeRO, FSDP2)  # exactly these: Lightning's own ZeRO would be wrong


class InfctxModule(pl.LightningModule):
    """A recurrent language model that learns from windows.

    Args:
        load: weights to start from: .pth, .safetensors, a checkpoint or a run folder. Wins over `init`.
        init: sizes of a new model.
        horizon: segments the gradient reaches back; null: the whole window (exact); 1: classical truncated BPTT.
        kernel: backend of the recurrence: auto, reference, chunked, cpu, fla, or cuda, also with -recurrent, -tensor or
            -pieces.
        tuning: what is trained in place of all weights; null: all.
        optimizer: how weights are updated.
        parts: parameters, by patterns of their names, that are frozen or have a rate or a weight decay of their own.
        l2_penalty: on the largest logit of each token; RWKV-LM's L2Wrap is 1.0e-4.
        parallel: how one document is spread over ranks: the section `parallel` of a recipe.
        states: which states at borders are kept, and where: the section `states` of a recipe.
    """

    def __init__(
        self,
        load: str | None = None,
        init: ModelConfig | None = None,
        horizon: int | None = None,
        kernel: str = "auto",
        tuning: Tuning | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        parts: list[Part] = [],  # noqa: B006 (read only)
        l2_penalty: float = 0.0,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
        states: StatesConfig = StatesConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if horizon is not None and horizon < 1:
            raise ValueError(f"model.horizon must be at least 1 segment, or null for the whole window, got {horizon}")
        require_known(kernel)
        if load is not None:
            self.model = load_model(load, torch.float32, kernel=kernel)
        elif init is not None:
            self.model = init_model(init, seed=torch.initial_seed() % 2**63, kernel=kernel)
        else:
            raise ValueError("model: give load (weights to start from) or init (sizes of a new model)")
        self.horizon, self.optimizer, self.tuning, self.l2_penalty = horizon, optimizer, tuning, l2_penalty
        self.base = Base(load, self.model, tuning) if load and tuning and tuning.adapter else None
        self.parts = (*(() if tuning is None else apply_tuning(self.model, tuning)), *parts)
        freeze(self.model, self.parts)
        self.silent, self.trained = Silent(), ""
        self.parallel, self.states = parallel, states
        self.lanes: State | None = None
        self.validation_lanes: State | None = None
        self.step_sums: dict[str, Tensor] = {}  # what the optimizer step has seen so far, on this rank
        self.counts = {"tokens": 0, "documents": 0, "seconds": 0.0}  # of the whole run, on all ranks
        self.learning_rate = self.grad_norm = 0.0
        self.group_rates: dict[str, float] = {}  # of each group of the optimizer
        self.asked_to_stop = self.stops = False  # this rank alone; all of them, after the step just made
        self._resumed: dict[str, Any] = {}
        self.outline: Outline | None = None  # of a model whose weights are in pieces
        self.runner: Runner = run_alone

    def setup(self, stage: str) -> None:
        """Refuse what would be wrong silently."""
        refuse_precision(self.trainer.precision)
        if stage == "fit":
            require_steps(self.trainer)
        choose(self.model.kernel, self.trainer.strategy.root_device.type)
        strategy = self.trainer.strategy
        if type(strategy) not in STRATEGIES:
            refuse_strategy(type(strategy).__name__)
        if isinstance(strategy, Cut):
            refuse_optimizer(self.optimizer.name)
            self.outline, self.runner = strategy.outline(self.model), strategy.runner
            if self.tuning is not None:
                self.tuning.require(strategy.in_pieces)
        if self.parallel.time > 1 and not isinstance(self.runner, Wavefront | Scan):
            self.runner = self._over_time()
        need = self.trainer.datamodule.tokenizer.vocab_size  # type: ignore[attr-defined]
        if self.model.config.vocab_size < need:
            raise ValueError(f"data.tokenizer has {need} ids, the model's vocab_size is {self.model.config.vocab_size}")

    def _over_time(self) -> Runner:
        """How the ranks that share lanes run a window. Raises: ValueError where they would wait for each other."""
        self.parallel.lane_groups(self.trainer.world_size)
        self.parallel.require(self.outline is not None, bool(self.model.config.n_gold))
        wait = timedelta(seconds=self.parallel.timeout)
        group, _ = torch.distributed.new_subgroups(self.parallel.time, timeout=wait)
        return Wavefront(group, wait) if self.parallel.schedule == "wavefront" else Scan(group, self.runner)

    @property
    def seen(self) -> Any:
        """The model as `window_loss` sees it."""
        return self.outline or self.model

    def forward(self, part: Callable[..., Any], *args: Any) -> Any:
        """A part of a step, called where an engine that wraps this module puts weights together."""
        return part(*args)

    def training_step(self, window: Window, index: int) -> Tensor:
        """Returns: the loss, scaled so that what the trainer and the ranks divide it by cancels out."""
        loss, metrics, self.lanes = window_loss(
            self.seen, window, self.lanes, self.horizon, window.normaliser,
            l2_penalty=self.l2_penalty, states=self.states, runner=self.runner,
        )  # fmt: skip
        refuse_non_finite(loss, metrics, window, index)
        seen = torch.stack([torch.count_nonzero(x) for x in (window.ids >= 0, window.start)]).double()
        seen *= self.trainer.global_rank % self.parallel.time == 0  # ranks that share lanes see the same window
        metrics["border_gradient"] = by_distance(metrics["border_gradient"])
        for name, x in {**metrics, "seen": seen.to(self.device)}.items():
            if name != "segment_loss":
                self.step_sums[name] = self.step_sums[name] + x if name in self.step_sums else x
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning calls it between `training_step` and its backward; under engines some gradients are there then."""
        if not isinstance(self.trainer.strategy, Cut):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Note the rate of this step, and the norm of its gradient before clipping, unless DeepSpeed will tell it."""
        first = optimizer.param_groups[0]
        self.learning_rate = first["lr"] / Group(*first["own"]).factor
        self.group_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        if not isinstance(self.trainer.strategy, ZeRO):
            self.note_norm(total_norm(self.model))
            if warning := self.silent.look(self.model):
                rank_zero_warn(warning)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By the norm noted already, and before fused optimizers too; DeepSpeed clips by itself."""
        if not gradient_clip_val or isinstance(self.trainer.strategy, ZeRO):
            return
        trained = [p for p in self.model.parameters() if p.grad is not None]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(trained, gradient_clip_val)
        else:
            norm = torch.tensor(self.grad_norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip_val, norm)

    def note_norm(self, norm: float) -> None:
        """The norm of the whole gradient of this step. Raises: FloatingPointError if it is not finite."""
        self.grad_norm = norm
        if not math.isfinite(self.grad_norm):
            raise FloatingPointError(f"the gradient's norm is {self.grad_norm} at step {self.trainer.global_step + 1}: "
                                     "no update was made from it; lower model.optimizer.lr")  # fmt: skip

    def take_step_sums(self, seconds: float) -> dict[str, Tensor]:
        """Sums over the optimizer step just made and over all ranks; counts them into the run."""
        self.step_sums["stop"] = torch.tensor([float(self.asked_to_stop)], dtype=torch.float64, device=self.device)
        flat = torch.cat([x.flatten() for x in self.step_sums.values()])
        total = self.trainer.strategy.reduce(flat, reduce_op="sum").cpu()  # one message for all of them
        parts = total.split([x.numel() for x in self.step_sums.values()])
        sums = {name: part.view(x.shape) for (name, x), part in zip(self.step_sums.items(), parts, strict=True)}
        self.step_sums, self.stops = {}, bool(sums.pop("stop"))
        self.counts["tokens"] += int(sums["seen"][0])
        self.counts["documents"] += int(sums["seen"][1])
        self.counts["seconds"] += seconds
        return sums

    def on_validation_epoch_start(self) -> None:
        """Validation has its own lanes and states."""
        self.validation_lanes = None
        columns = 1 + len(self.trainer.datamodule.held_out.names)  # type: ignore[attr-defined]
        self.validation_sums = torch.zeros(2, columns, dtype=torch.float64, device=self.device)

    def validation_step(self, window: Window, index: int) -> None:
        """Add up the loss of held-out documents."""
        _, metrics, self.validation_lanes = window_loss(self.seen, window, self.validation_lanes, runner=self.runner)
        self.validation_sums[:, 0] += torch.stack([metrics["loss_sum"], metrics["tokens"]])
        self.validation_sums[:, 1:] += torch.stack([metrics["source_loss"], metrics["source_tokens"]])

    def on_validation_epoch_end(self) -> None:
        """Log the loss by token over all held-out documents."""
        self.validation_sums = self.trainer.strategy.reduce(self.validation_sums, reduce_op="sum")
        total, tokens = self.validation_sums[:, 0]
        self.log("validation_loss", (total / tokens.clamp(min=1)).float(), rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule over all the steps of the run."""
        optimizer = make_optimizer(self.model, self.optimizer, self.parts)
        course = self.trainer.datamodule.course(self.optimizer.unit)  # type: ignore[attr-defined]
        schedule = make_schedule(optimizer, self.optimizer, course)
        if self.trainer.is_global_zero and (warning := warmup_left(self.optimizer, course)):
            print(warning)
        self.trained = table(self.model, optimizer.param_groups)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the lanes carry, the generators' states and the counts, of all ranks."""
        checkpoint["infctx"] = {**self._place.gather(self.lanes), "counts": dict(self.counts)}
        if self.base is not None:
            checkpoint["infctx"]["base"] = self.base.facts()
            for name in self.base.left_out(self.model):
                checkpoint["state_dict"].pop(f"model.{name}", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the run starts, when nothing draws random numbers any more; counts are told of before."""
        if self.base is not None:
            self.base.require(checkpoint["infctx"].get("base"))
            require_trained(self.model, {name.removeprefix("model.") for name in checkpoint["state_dict"]})
            self.strict_loading = False
        self._resumed = checkpoint["infctx"]
        self.counts = dict(self._resumed["counts"])

    def on_train_start(self) -> None:
        """Go on with the lanes and generators of the checkpoint."""
        if not self._resumed:
            return
        apply_config(self.optimizers(), self.lr_schedulers(), self.optimizer, self.parts)
        self.lanes = self._place.lanes(self._resumed, self.seen.initial_state(1))
        self._place.seed(self._resumed)
        self._resumed = {}

    @property
    def _place(self) -> Place:
        return Place(self.trainer.global_rank, self.trainer.world_size, self.parallel.time, self.device)
