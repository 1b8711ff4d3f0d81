"""The command `check`: a dry run of a recipe for N ranks on one machine, which prepares and trains nothing."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from infctx.borders import StatesConfig
from infctx.bptt import Runner, run_alone, window_loss
from infctx.config import ModelConfig
from infctx.engines import STRATEGIES
from infctx.job import Job
from infctx.models.rwkv import RWKV, init_model
from infctx.ops.backends import available, choose
from infctx.parallel.config import ParallelConfig
from infctx.planning import (
    model_config,
    opened,
    parallel_of,
    parts_of,
    require_sound,
    stand_in,
    strategy_name,
    tuning_of,
)
from infctx.plantext import count
from infctx.refusals import refuse_optimizer
from infctx.segments import Window

TINY_SEGMENTS, TINY_TOKENS = 3, 16


def check_recipe(config: Any) -> None:
    """Say what was checked, up to the first fault. Raises: ValueError that names it and the mend."""
    ranks = config.ranks[0] if config.ranks else 1
    if len(config.ranks) > 1:
        raise ValueError(f"check --ranks takes one number of ranks, got {config.ranks}")
    parallel, states = parallel_of(config), StatesConfig(**config.states.as_dict())
    model = _check_model(config)
    _check_trainer(config, ranks, model, parallel)
    _check_trained(config, model)
    loaders = _check_data(config, ranks, parallel, model)
    size, kernel = 1 if model.arch == "rwkv4" else 16, config.model.kernel
    tiny = init_model(ModelConfig(model.arch, 2, 32, model.vocab_size, size), kernel=_runs_here(kernel))
    for rank in range(ranks):
        _tiny_step(tiny, config, parallel, states, loaders[rank].window(0), rank, ranks)
    print(f"steps: a window of a tiny {model.arch}, forward and backward, as each of {count(ranks, 'rank')}")
    print("check: no fault found; not checked: memory (see infctx plan), speed, the network")


def _check_model(config: Any) -> ModelConfig:
    model = config.model
    require_sound(config)
    if config.trainer.accelerator == "cpu":
        choose(model.kernel, "cpu")
    found = model_config(model)
    print(f"model: {found.arch}, {found.n_layer} layers of {found.n_embd} channels, vocabulary of {found.vocab_size:,}")
    return found


def _check_trainer(config: Any, ranks: int, model: ModelConfig, parallel: ParallelConfig) -> None:
    trainer = config.trainer
    groups = parallel.lane_groups(ranks)
    if str(trainer.devices).isdigit() and int(trainer.devices) * trainer.num_nodes != ranks:
        there = f"trainer.devices {trainer.devices} on trainer.num_nodes {trainer.num_nodes}"
        raise ValueError(f"{there} are not the {ranks} ranks of --ranks: set trainer.devices to {ranks}")
    name = strategy_name(trainer.strategy, ranks)
    parallel.require(STRATEGIES[name].weights, bool(model.n_gold))
    if (tuning := tuning_of(config.model)) is not None:
        tuning.require(STRATEGIES[name].weights)
    if name not in ("single", "ddp"):
        refuse_optimizer(config.model.optimizer.name)
    print(f"ranks: {ranks}, strategy {name}; {parallel.time} share a document, "
          f"{count(groups, 'group')} with lanes of their own")  # fmt: skip


def _check_trained(config: Any, model: ModelConfig) -> None:
    job = Job(model, 1, 1, 1, tuning=tuning_of(config.model), parts=parts_of(config.model))
    parameters = list(job.outline().parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"trained: {trained:,} of {sum(p.numel() for p in parameters):,} parameters")


def _check_data(config: Any, ranks: int, parallel: ParallelConfig, model: ModelConfig) -> list[Any]:
    """The loaders of an epoch on every rank, which must have the same windows."""
    trainer, data = config.trainer, opened(config.data)
    need = data.tokenizer.vocab_size
    if model.vocab_size < need:
        raise ValueError(f"data.tokenizer has {need} ids, the model's vocab_size is {model.vocab_size}: "
                         f"set model.init.vocab_size to {need}, or choose another tokenizer")  # fmt: skip
    data.parallel, data.seed, loaders = parallel, int(config.seed_everything), []
    for rank in range(ranks):
        data.trainer = stand_in(trainer, ranks, rank)
        loaders.append(data.train_dataloader())
    shapes = {(len(x), tuple(x.plan.borders), x.normaliser(0)) for x in loaders}
    if len(shapes) != 1:
        raise ValueError("data: the ranks would have different windows: run `infctx prepare` again on one machine")
    if not len(loaders[0]):
        raise ValueError(f"trainer.limit_train_batches {trainer.limit_train_batches} leaves no window of an epoch")
    steps, longest = data.total_steps(), int(np.diff(loaders[0].plan.borders).max()) // data.segment_length
    print(data.describe(config.model.horizon))
    print(f"windows: {len(loaders[0]):,} an epoch on every rank, up to {longest:,} segments; {steps:,} steps in all")
    return loaders


def _runs_here(kernel: str) -> str:
    """A dry run of a recipe for GPUs is made on a CPU."""
    return kernel if kernel in available("cpu") else "auto"


def _tiny_step(
    tiny: RWKV, config: Any, parallel: ParallelConfig, states: StatesConfig, window: Window, rank: int, ranks: int
) -> None:
    """A window's beginning through a small model of the same architecture, as one rank of a group that is pretended."""
    tensors: dict[str, Any] = {name: x for name, x in window._asdict().items() if isinstance(x, torch.Tensor)}
    part = window._replace(**{k: x[:, :TINY_SEGMENTS, :TINY_TOKENS].contiguous() for k, x in tensors.items()})
    horizon = config.model.horizon
    if ranks == 1:
        window_loss(tiny, part, None, horizon, part.normaliser, states=states)[0].backward()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        runner = _runner(parallel)
        window_loss(tiny, part, None, horizon, part.normaliser, states=states, runner=runner)[0].backward()
        for p in tiny.parameters():
            if p.requires_grad:
                dist.all_reduce(p.grad)
    finally:
        dist.destroy_process_group()


def _runner(parallel: ParallelConfig) -> Runner:
    if parallel.time == 1:
        return run_alone
    from infctx.parallel.scan import Scan
    from infctx.parallel.wavefront import Wavefront

    first = dist.get_rank() // parallel.time * parallel.time
    group = dist.new_group(list(range(first, first + parallel.time)))
    return Wavefront(group) if parallel.schedule == "wavefront" else Scan(group)
