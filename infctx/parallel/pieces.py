"""Tensors in pieces over ranks, and whole ones: what FSDP2 and checkpoints need of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def cut_model(model: Any, mesh: DeviceMesh, low: torch.dtype | None) -> None:
    """Cut a model up over the ranks, layer by layer, unless that is done. The head stays whole during a window.

    Args:
        model: as `models.rwkv.RWKV`. mesh: the ranks. low: in which layers are put together and computed.
    """
    if isinstance(model, FSDPModule):
        return
    # States are float32 whatever the layers compute in: inputs are not cast.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    # Called outside the layer it lies in; GoldFinch's upper layers read it and the embedding too, after their calls.
    fully_shard(model.blocks[0].ln0, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if not model.config.n_gold:
        fully_shard(model.emb, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "features")


def whole(x: Any, keep: bool) -> Any:
    """A tensor put together from all ranks, on the CPU where it is kept, None elsewhere; other things as they are."""
    if isinstance(x, DTensor):
        x = x.full_tensor()
    if not isinstance(x, Tensor):
        return x
    return x.detach().cpu() if keep else None


def cut_like(x: Any, p: nn.Parameter) -> Any:
    """This rank's piece of a whole tensor that belongs to a parameter; what has another shape as it is."""
    if not isinstance(p, DTensor) or not isinstance(x, Tensor) or x.shape != p.shape:
        return x
    x = x.to(p.device_mesh.device_type)
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


def own_piece(x: Tensor, rank: int, size: int) -> Tensor:
    """A rank's `size` numbers of a tensor, with zeros beyond its end."""
    piece = x.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(piece, (0, size - len(piece)))
