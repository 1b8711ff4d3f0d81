"""What a checkpoint has of all ranks' lanes and generators, and each rank's part of it when a run goes on.

Ranks that share a document have the same lanes: one of them counts.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.state import KeyMemory, State, join, pack, select, unpack


class Place(NamedTuple):
    """Of a rank among all of them."""

    rank: int
    ranks: int
    time: int  # ranks that share lanes
    device: torch.device

    def gather(self, lanes: State | None) -> dict[str, Any]:
        """Lanes and generators of all ranks, on the CPU; called by all."""
        rows, on_gpu = None, self.device.type == "cuda"
        if lanes is not None:
            rows = torch.cat(self._rows(pack(lanes)).chunk(self.ranks)[:: self.time])
        return {
            "lanes": rows,
            "memory": None if lanes is None or lanes.memory is None else self._memory(lanes.memory),
            "rng": self._rows(torch.get_rng_state().unsqueeze(0)),
            "cuda_rng": self._rows(torch.cuda.get_rng_state(self.device).unsqueeze(0)) if on_gpu else None,
        }

    def lanes(self, saved: dict[str, Any], like: State) -> State | None:
        """This rank's lanes, of those that `gather` gave on any number of ranks. Args: like: a state of one lane."""
        if saved["lanes"] is None:
            return None
        group = self.rank // self.time
        rows = saved["lanes"].chunk(self.ranks // self.time)[group].to(self.device)
        memory = None
        if saved.get("memory") is not None:
            own = torch.arange(group * len(rows), (group + 1) * len(rows))
            chosen = select(State((), KeyMemory(*saved["memory"])), own).memory
            memory = chosen and KeyMemory(*(x.to(self.device) for x in chosen[:3]))
        return unpack(rows, like, memory)

    def seed(self, saved: dict[str, Any]) -> None:
        """Set the generators to what they were."""
        rng, cuda_rng = saved["rng"], saved["cuda_rng"]
        torch.set_rng_state(rng[self.rank % len(rng)].clone())  # torch crashes on a row of a matrix
        if cuda_rng is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_rng[self.rank % len(cuda_rng)].clone(), self.device)

    def _rows(self, rows: Tensor) -> Tensor:
        if self.ranks == 1:
            return rows.cpu()
        own = rows.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own)
        return torch.cat(parts).cpu()

    def _memory(self, memory: KeyMemory) -> tuple[Tensor, ...]:
        own = tuple(x.cpu() for x in memory[:3])
        if self.ranks == 1:
            return own
        parts: list[Any] = [None] * self.ranks
        dist.all_gather_object(parts, own)
        return join([KeyMemory(*x) for x in parts[:: self.time]])[:3]
