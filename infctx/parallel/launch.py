"""Ranks that torchrun or SLURM has started as copies of one command: the first alone decides what run they make."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import DistError, PrefixStore, Store, rendezvous

from infctx.errors import UserError

Decision = tuple[Path, Path | None]  # a run's folder, and the checkpoint it goes on from


def decide_once(decide: Callable[[], Decision], timeout: float) -> Decision:
    """Rank 0's decision, on every rank: copies that look for themselves see another clock, or another folder.

    Without a launcher `decide` is just called: Lightning hands what rank 0 decided to the ranks it starts.

    Args:
        timeout: seconds in which all copies must have come and rank 0 must have decided.
    Raises: UserError where a copy does not come; on every rank, what `decide` raises on rank 0.
    """
    environment = _launcher()
    if environment is None:
        return decide()
    store = _meet(environment, timeout)
    try:
        if environment.global_rank() == 0:
            return _tell(decide, store)
        return _listen(store, environment.world_size())
    except DistError:
        raise UserError(f"rank 0 did not decide within parallel.timeout, {timeout:g} s, or is gone") from None


def cluster_plugins(given: list[Any]) -> list[ClusterEnvironment]:
    """What to add to a trainer's plugins: under SLURM, that Lightning writes no checkpoint of its own when preempted.

    It would lie outside of the run's folder, and any later run there would begin from it.
    """
    own = any(isinstance(plugin, ClusterEnvironment) for plugin in given)
    if own or TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [_slurm()]


def require_world(ranks: int) -> None:
    """Refuse a trainer that leaves out copies: each would train for itself, in the same folder. Raises: ValueError."""
    environment = _launcher()
    if environment is not None and environment.world_size() != ranks:
        raise ValueError(
            f"{environment.world_size()} copies of the command were started, trainer.devices x trainer.num_nodes is "
            f"{ranks}: make them equal (with one process, start no copies)"
        )


def _launcher() -> TorchElasticEnvironment | SLURMEnvironment | None:
    """In the order in which Lightning looks; None: this process is no copy, or the only one."""
    if TorchElasticEnvironment.detect():
        environment: TorchElasticEnvironment | SLURMEnvironment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        environment = _slurm()
    else:
        return None
    return environment if environment.world_size() > 1 else None


def _slurm() -> SLURMEnvironment:
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:  # srun's options contradict each other
        raise UserError(str(error)) from None


def _meet(environment: TorchElasticEnvironment | SLURMEnvironment, timeout: float) -> Store:
    """The store by which torch's own groups are made later, with a room of its own."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    rank, ranks = environment.global_rank(), environment.world_size()
    try:
        store, _, _ = next(rendezvous("env://", rank, ranks, timeout=timedelta(seconds=timeout)))
    except DistError as error:
        where = f"{environment.main_address}:{environment.main_port}"
        raise UserError(
            f"not all of {ranks} copies came to rank 0 at {where} within parallel.timeout, {timeout:g} s; start them "
            f"all, with torchrun or srun: {str(error).splitlines()[0]}"
        ) from None
    return PrefixStore("infctx", store)


def _tell(decide: Callable[[], Decision], store: Store) -> Decision:
    said: dict[str, Any] = {}
    try:
        decision = decide()
        said["decision"] = [path and str(path.absolute()) for path in decision]
        return decision
    except SystemExit as end:
        said["exit"] = end.code
        raise
    except Exception as error:
        said["error"] = str(error) or type(error).__name__
        raise
    finally:
        store.set("said", json.dumps(said))
        store.wait(["heard"])  # by all: where no agent keeps the store, it ends with this process


def _listen(store: Store, ranks: int) -> Decision:
    said = json.loads(store.get("said"))
    if store.add("hearers", 1) == ranks - 1:
        store.set("heard", "")
    if "exit" in said:
        raise SystemExit(said["exit"])
    if "error" in said:
        raise UserError(said["error"])
    folder, resume = said["decision"]
    return Path(folder), resume and Path(resume)
