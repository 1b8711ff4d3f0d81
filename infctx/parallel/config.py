"""How one document is spread over ranks."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """One document over many ranks.

    Args:
        time: ranks that share the lanes of each window; the number of ranks must be a multiple of it.
        schedule: wavefront: whole segments go to these ranks in turn; scan: each segment is split over them.
        timeout: seconds that the ranks wait for one that is silent or stands still before they end, naming it.
    """

    time: int = 1
    schedule: Literal["wavefront", "scan"] = "wavefront"
    timeout: int = 1800

    def __post_init__(self) -> None:
        if self.time < 1:
            raise ValueError(f"parallel.time must be at least 1 rank, got {self.time}")
        if self.timeout < 1:
            raise ValueError(f"parallel.timeout must be at least 1 second, got {self.timeout}")

    def require(self, in_pieces: bool, remembers: bool) -> None:
        """Refuse what the ranks that share lanes cannot do.

        Args: in_pieces: the weights are cut up over ranks. remembers: the model has GoldFinch's attention.
        Raises: ValueError.
        """
        if self.time > 1 and self.schedule == "wavefront" and in_pieces:
            raise ValueError(
                "parallel.schedule wavefront: its ranks are in different layers at a time, and zero3 and fsdp2 put "
                "each layer together on all of them: choose parallel.schedule scan, or zero2"
            )
        if self.time > 1 and self.schedule == "scan" and remembers:
            raise ValueError("parallel.schedule scan: GoldFinch's attention needs all keys; choose wavefront")

    def lane_groups(self, ranks: int) -> int:
        """How many groups of ranks have lanes of their own. Raises: ValueError if the ranks cannot be divided so."""
        if ranks % self.time:
            raise ValueError(f"parallel.time {self.time}: the run has {ranks} ranks, which is no multiple of it")
        return ranks // self.time
