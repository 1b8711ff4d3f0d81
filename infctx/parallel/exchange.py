"""What the ranks of a scan tell each other, and how it is put together.

A stretch of tokens maps the state S before it to S A + C after it, whatever S is. R ranks, B lanes, N sequences,
M tokens, C channels, H heads of V value and K key channels.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.ops.native import VALUE
from infctx.ops.tiles import NOTHING

Run = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, Tensor]]  # an op: its inputs, its states -> y, last states


class Map(Protocol):
    """How the tokens of a recurrence change its states."""

    name: str
    lost: float  # the transition A that leaves nothing of a state

    def nothing(self, state: Tensor) -> Tensor:
        """States that add nothing, like these."""

    def transition(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """A of each sequence, and how y reads the state that its sequence began with, if that does not depend on it."""

    def reading(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, reads: Tensor) -> Tensor:
        """How y reads the state that its sequence began with: like y. Args: reads: of `transition`."""

    def step(self, state: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The lanes' states after a stretch, and what takes their gradient back: see `back`."""

    def back(self, g: Tensor, a: Tensor) -> Tensor:
        """The gradient of the states before a stretch. Args: g: of those after it."""

    def read_gradient(self, dy: Tensor, y: Tensor, reads: Tensor) -> Tensor:
        """The gradient that the y of some tokens give for the state before them. Args: (tokens, ...) in its dtype."""

    def rescale(self, state: Tensor, like: Tensor) -> Tensor:
        """What turns the gradient of the states `like` into that of `state`, which stand for the same."""


class Matrix:
    """RWKV-7: A is (K, K), and y = S q + what does not depend on S, with q what an identity in place of S gives."""

    name, lost = "wkv7", 0.0

    def nothing(self, state: Tensor) -> Tensor:
        return torch.zeros_like(state)

    def transition(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        identity = torch.eye(state.shape[-1], dtype=state.dtype, device=state.device).expand_as(state)
        q, a = run(_silent(self.name, inputs), identity)
        return a, q

    def reading(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, reads: Tensor) -> Tensor:
        return reads

    def step(self, state: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return state @ a + c, a

    def back(self, g: Tensor, a: Tensor) -> Tensor:
        return g @ a.mT

    def read_gradient(self, dy: Tensor, y: Tensor, reads: Tensor) -> Tensor:
        return torch.einsum("thv,thk->hvk", dy, reads)

    def rescale(self, state: Tensor, like: Tensor) -> Tensor:
        return state.new_ones(())


class Diagonal(Matrix):
    """RWKV-5 and RWKV-6: A is a decay of each key channel, (H, 1, K)."""

    name = "wkv6"

    def transition(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        a, q = super().transition(run, inputs, state, lengths)
        return a.diagonal(dim1=-2, dim2=-1).unsqueeze(-2), q

    def step(self, state: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return state * a + c, a

    def back(self, g: Tensor, a: Tensor) -> Tensor:
        return g * a


class LogSum:
    """RWKV-4: A is a log decay of each channel. y is a quotient, so how it reads the state depends on the state."""

    name, lost = "wkv4", -float("inf")

    def nothing(self, state: Tensor) -> Tensor:
        zeros = torch.zeros_like(state)
        zeros[:, 2] = NOTHING
        return zeros

    def transition(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return lengths.unsqueeze(1) * inputs[0], state.new_empty(0)

    def reading(self, run: Run, inputs: tuple[Tensor, ...], state: Tensor, reads: Tensor) -> Tensor:
        one = torch.cat([torch.ones_like(state[:, :1]), state[:, 1:]], 1)
        return run(_silent(self.name, inputs), one)[0]

    def step(self, state: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        decayed = (state[:, 2] + a).clamp(min=NOTHING)
        top = torch.maximum(decayed, c[:, 2])
        left, right = (decayed - top).exp().unsqueeze(1), (c[:, 2] - top).exp().unsqueeze(1)
        after = torch.cat([left * state[:, :2] + right * c[:, :2], top.unsqueeze(1)], 1)
        return after, left

    def back(self, g: Tensor, a: Tensor) -> Tensor:
        return g * a

    def read_gradient(self, dy: Tensor, y: Tensor, reads: Tensor) -> Tensor:
        dn = dy * reads
        n, d = dn.sum(0), -(dn * y).sum(0)
        return torch.stack([n, d, torch.zeros_like(n)])

    def rescale(self, state: Tensor, like: Tensor) -> Tensor:
        return (state[:, 2:] - like[:, 2:]).exp()


DIAGONAL = Diagonal()
MAPS: dict[str, Map] = {"wkv4": LogSum(), "wkv6": DIAGONAL, "wkv7": Matrix()}


def _silent(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same tokens with values of 0: they change the state and add nothing to it."""
    return tuple(torch.zeros_like(x) if i == VALUE[name] else x for i, x in enumerate(inputs))


class Line:
    """The ranks of a group in the order of their tokens. Each method is called by all of them, in the same order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, *parts: Tensor) -> list[Tensor]:
        """(R, B, ...) of every rank's (B, ...), in one message."""
        flat = torch.cat([x.flatten(1) for x in parts], 1).contiguous()
        all_ranks = flat.new_empty(self.size, *flat.shape)
        dist.all_gather(list(all_ranks.unbind(0)), flat, group=self.group)
        widths = [x.shape[1:].numel() for x in parts]
        return [y.unflatten(2, x.shape[1:]) for x, y in zip(parts, all_ranks.split(widths, 2), strict=True)]

    def forth(self, kind: Map, state: Tensor, a: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor]:
        """The lanes' states before each rank's tokens and after the last's; (R, B, ...) what `back` takes.

        Args: state: of the lanes, the same on every rank. a, c: the map of this rank's tokens.
        """
        states, backward = [state], []
        with torch.autocast(state.device.type, enabled=False):
            for a_rank, c_rank in zip(*self.gather(a, c), strict=True):
                after, way_back = kind.step(states[-1], a_rank, c_rank)
                states.append(after)
                backward.append(way_back)
        return states, torch.stack(backward)

    def back(self, kind: Map, g: Tensor, e: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the lanes' states before all tokens, and after this rank's.

        Args: g: of the states after all, the same on every rank. e: what this rank's tokens give for those before them.
        """
        (given,), own = self.gather(e), g
        with torch.autocast(g.device.type, enabled=False):
            for rank in reversed(range(self.size)):
                own = g if rank == self.rank else own
                g = given[rank] + kind.back(g, a[rank])
        return g, own


class Handed(torch.autograd.Function):
    """Rows that each rank hands to the next one that needs them: (B, C) before this rank's tokens, and after all."""

    @staticmethod
    def forward(ctx: Any, line: Line, lanes: Tensor, kept: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Args: lanes (B, C), the same on every rank. kept (B, 1): 1 where this rank has none, and `rows` are 0."""
        states, a = line.forth(DIAGONAL, lanes, kept, rows)
        ctx.line = line
        ctx.save_for_backward(a)
        return states[line.rank].clone(), states[-1]

    @staticmethod
    def backward(ctx: Any, e: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        first, own = ctx.line.back(DIAGONAL, g, e, a)
        return None, first, None, own
