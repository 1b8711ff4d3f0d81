"""How the next token is chosen from the logits.

N rows, V ids of the tokenizer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 1e6  # of a penalty: of sums and products with larger ones, nothing finite may be left
SEEDS = 1 << 63


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: by the penalties, then temperature, then top_k, then top_p; and when the text ends.

    Args:
        max_tokens: at most this many tokens follow.
        temperature: 0 takes the likeliest token each time.
        top_k: draw from this many likeliest tokens; 0 is all of them.
        top_p: draw from the fewest tokens that hold this probability.
        repetition_penalty: divides positive and multiplies negative logits of what prompt or text holds; 1 is none.
        presence_penalty: taken off the logit of each token that the new text holds.
        frequency_penalty: taken off the logit of a token for each time that the new text holds it.
        stop: a text, or a list of them, that ends the new text and is left out of it.
        seed: of the draws; row r of a batch draws by seed + r.
    Raises: ValueError for what is out of range.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] | str = ()
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_tokens": (self.max_tokens >= 0, "at least 0"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "repetition_penalty": (1 / LARGEST <= self.repetition_penalty <= LARGEST, "from 1e-6 to 1e6 (1: none)"),
            "presence_penalty": (abs(self.presence_penalty) <= LARGEST, "from -1e6 to 1e6"),
            "frequency_penalty": (abs(self.frequency_penalty) <= LARGEST, "from -1e6 to 1e6"),
            "stop": (all(self.stops), "texts that are not empty"),
            "seed": (0 <= self.seed < SEEDS, "at least 0 and below 2**63"),
        }
        for name, (sound, rule) in rules.items():
            if not sound:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def adjust(logits: Tensor, sampling: Sampling, seen: Tensor, counts: Tensor) -> Tensor:
    """The logits as the settings change them: -inf for what is not to be drawn.

    Args: logits (N, V). seen (N, V) bool: ids in prompt or text. counts (N, V): how often each is in the text.
    """
    penalty = sampling.repetition_penalty
    scores = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.temperature == 0:
        return scores
    # The largest becomes 0: then no temperature, however small, makes it infinite.
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -math.inf)
    return nucleus(scores, sampling.top_p) if sampling.top_p < 1 else scores


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores (N, V), -inf but for the fewest ids of each row that hold the probability top_p.

    The likeliest are taken in growing numbers: to sort a vocabulary takes longer than many a model does for a token.
    """
    p, k = scores.softmax(-1), 64
    while True:
        likeliest, ids = p.topk(min(k, p.shape[-1]))
        heights = likeliest.cumsum(-1)
        if k >= p.shape[-1] or bool((heights[:, -1] >= top_p).all()):
            break
        k *= 8
    kept = scores.gather(-1, ids).masked_fill(heights - likeliest >= top_p, -math.inf)
    return torch.full_like(scores, -math.inf).scatter(-1, ids, kept)


def choose(scores: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """An id for each row of (N, V): (N,) int64.

    A draw takes one number of the row's own CPU generator and goes through the ids in their order: so it is the same
    on every device, whatever else is in the batch, and rounding of the scores changes it only at a border.
    """
    if sampling.temperature == 0:
        return scores.argmax(-1)
    heights = scores.softmax(-1).cumsum(-1)
    shares = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    places = shares.to(heights.device).unsqueeze(1) * heights[:, -1:]
    return torch.searchsorted(heights, places, right=True).squeeze(1)
