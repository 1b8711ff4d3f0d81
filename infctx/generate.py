"""Text from a model: the prompt in stretches, then a token at a time, by the same forward and one state."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from infctx.state import State
from infctx.tokenizer import END_OF_DOCUMENT, Tokenizer

STRETCH = 1024  # tokens of the prompt at once


def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, max_tokens: int = 64, temperature: float = 1.0,
    top_p: float = 1.0, seed: int = 0,
) -> str:  # fmt: skip
    """The text that follows a prompt, up to max_tokens tokens or the end of the document.

    Args: temperature: 0 takes the likeliest token. top_p: draws from the fewest tokens that hold this probability.
        seed: of the draws.
    Raises: ValueError for an empty prompt or numbers out of range.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)]
    return tokenizer.decode(sample(model, ids, max_tokens, temperature, top_p, seed, vocab_size=tokenizer.vocab_size))


@torch.inference_mode()
def sample(
    model: nn.Module, prompt: list[int], max_tokens: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
    state: State | None = None, vocab_size: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """The ids below vocab_size that follow `prompt` after `state`, one by one. Args and raises: as `generate`."""
    if not prompt:
        raise ValueError("prompt must hold at least one token: the model continues a text")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for stretch in torch.tensor([prompt], device=device).split(STRETCH, 1):
        logits, state = model(stretch, state)
    for _ in range(max_tokens):
        token = _choose(logits[0, -1, :vocab_size].double().cpu(), temperature, top_p, generator)
        if token == END_OF_DOCUMENT:
            return
        yield token
        logits, state = model(torch.tensor([[token]], device=device), state)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return int(order[torch.multinomial(p, 1, generator=generator)])
