"""Where the states at the borders of a window's segments lie between the passes over it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class StatesConfig:
    """Which states at the borders of segments are kept for the way back, and where.

    Args:
        keep: all; or every-N, such as every-16: the N - 1 between two kept ones are computed again when they are
            needed, at the cost of one more forward of the window, and n borders need the memory of n / N + N.
        offload: cpu: in the host's memory; none: on the device.
    """

    keep: str = "all"
    offload: Literal["none", "cpu"] = "none"

    def __post_init__(self) -> None:
        number = self.keep.removeprefix("every-")
        if self.keep != "all" and not (self.keep.startswith("every-") and number.isdigit() and int(number) > 0):
            raise ValueError(f"states.keep must be all or every-N, such as every-16, got {self.keep!r}")

    def block(self, segments: int, ranks: int = 1) -> int:
        """How many segments in a row have all their borders in memory at a time.

        Args: ranks: to which segments go in turn: a number that shares no divisor with them, or all kept borders would
            lie on some of the ranks.
        """
        if self.keep == "all":
            return segments
        every = int(self.keep.removeprefix("every-"))
        while math.gcd(every, ranks) > 1:
            every += 1
        return min(segments, every)


class Borders:
    """Room for the lanes' states (B, D) at some borders, in one piece: many small ones would scatter the heap."""

    def __init__(self, count: int, lanes: Tensor, config: StatesConfig) -> None:
        self.device, host = lanes.device, config.offload == "cpu"
        pinned = host and lanes.is_cuda
        self.rows = torch.empty(
            count, *lanes.shape, dtype=lanes.dtype, device="cpu" if host else lanes.device, pin_memory=pinned
        )

    def __setitem__(self, border: int, lanes: Tensor) -> None:
        self.rows[border].copy_(lanes, non_blocking=True)  # what reads it comes later in the same stream

    def __getitem__(self, border: int) -> Tensor:
        return self.rows[border].to(self.device, non_blocking=True)
