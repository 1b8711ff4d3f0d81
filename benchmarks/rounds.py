"""Times of things that are to be compared: each once in every round, in shuffled order."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def interleaved(
    things: Mapping[str, Callable[[], Any]], rounds: int, device: str, after: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each thing in each round. `after(name)` is called behind each, outside its time."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name in random.sample(list(things), len(things)):
            wait(device)
            begin = time.perf_counter()
            things[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - begin)
            after(name)
    return seconds
