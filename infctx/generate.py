"""Text from a model: prompts in parallel stretches, then a token at a time, by the same forward and one state.

N rows (prompts), C channels, V ids of the tokenizer.
"""

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from infctx.models.rwkv import RWKV
from infctx.sampling import Sampling, adjust, choose
from infctx.state import State, select
from infctx.tokenizer import Tokenizer

STRETCH = 1024  # tokens of each text that are read at once


def generate(
    model: RWKV, tokenizer: Tokenizer, prompt: str | list[str], max_tokens: int = 64, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0, stop: Sequence[str] | str = (), seed: int = 0, state: State | None = None,
) -> str | list[str]:  # fmt: skip
    """The text that follows a prompt, up to max_tokens tokens, a stop text or the end of the document.

    Args: prompt: N prompts in a list are continued together and give a list; row r is, to rounding, what its prompt
        gives alone with seed + r. state: what goes before the prompts: N rows, or one for all. The others: `Sampling`.
    Raises: ValueError for an empty prompt, or what is out of range.
    """
    sampling = Sampling(
        max_tokens, temperature, top_k, top_p, repetition_penalty, presence_penalty, frequency_penalty, stop, seed
    )
    stream = Stream(model, tokenizer, [prompt] if isinstance(prompt, str) else prompt, sampling, state)
    for _ in stream:
        pass
    return stream.texts[0] if isinstance(prompt, str) else stream.texts


class Stream:
    """The texts that follow N prompts: iterating makes them and gives (row, piece of its text); again, the same.

    A piece never ends inside a character, nor in what may be the beginning of a stop text.

    Args: prompts: N texts. state: what goes before them: N rows, or one for all.
    Raises: ValueError for an empty prompt, a state of other rows, or more ids in the tokenizer than in the model.
    """

    def __init__(
        self, model: RWKV, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, state: State | None = None
    ) -> None:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        if not ids or not all(map(len, ids)):
            raise ValueError("prompt must hold at least one token: the model continues a text")
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._features, self.prompt_state = read(model, ids, state)  # the state after the prompts, N rows
        self._state = self.prompt_state
        self._rows = list(range(len(ids)))  # those that features and state are of
        self._live = set(self._rows) if sampling.max_tokens else set()
        self._stopped: set[int] = set()
        self._drawn: list[list[int]] = [[] for _ in ids]
        self._texts: list[list[str]] = [[] for _ in ids]
        self._generators = [torch.Generator().manual_seed(sampling.seed + row) for row in self._rows]
        self._counts = torch.zeros(len(ids), tokenizer.vocab_size, dtype=torch.int32, device=self._features.device)
        self._seen = self._counts.bool()
        for row, prompt in enumerate(ids):
            self._seen[row, torch.from_numpy(prompt.astype(np.int64))] = True

    def __iter__(self) -> Iterator[tuple[int, str]]:
        rows = {row: self._pieces(row) for row in range(len(self._drawn))}
        self._texts = [[] for _ in rows]
        while rows:
            for row in list(rows):
                piece = next(rows[row], None)
                if piece is None:
                    del rows[row]
                else:
                    self._texts[row].append(piece)
                    yield row, piece

    @property
    def texts(self) -> list[str]:
        """What followed each prompt, as far as it was iterated."""
        return ["".join(pieces) for pieces in self._texts]

    def state(self) -> State:
        """What the model carries after each prompt and its text, N rows.

        The texts are read once more, together: rows end at different times, and a stop text is drawn but not kept.
        """
        ids = [
            self.tokenizer.encode(text) if row in self._stopped else np.array(self._drawn[row], np.int64)
            for row, text in enumerate(self.texts)
        ]
        return read(self.model, ids, self.prompt_state)[1] if any(map(len, ids)) else self.prompt_state

    def _pieces(self, row: int) -> Iterator[str]:
        if (yield from until(self.sampling.stops, self.tokenizer.stream(self._ids(row)))):
            self._live.discard(row)
            self._stopped.add(row)

    def _ids(self, row: int) -> Iterator[int]:
        """The tokens of a row. Whichever row is first short of one makes the whole batch go on."""
        place = 0
        while place < len(self._drawn[row]) or row in self._live:
            if place == len(self._drawn[row]):
                self._step()
            else:
                yield self._drawn[row][place]
                place += 1

    @torch.inference_mode()
    def _step(self) -> None:
        """Draw a token for each row that has not ended, after reading the ones drawn before."""
        if any(self._drawn):
            self._read()
        rows = torch.tensor(self._rows, device=self._features.device)
        logits = self.model.head(self._features)[:, : self.tokenizer.vocab_size].double()
        if not logits.isfinite().all():
            raise FloatingPointError(
                "the model's logits are not finite: its weights, or the state given, are not sound"
            )
        scores = adjust(logits, self.sampling, self._seen[rows], self._counts[rows])
        tokens = choose(scores, self.sampling, [self._generators[row] for row in self._rows])
        self._seen[rows, tokens] = True
        self._counts[rows, tokens] += 1
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            if token == self.tokenizer.end_of_document:
                self._live.discard(row)
                continue
            self._drawn[row].append(token)
            if len(self._drawn[row]) == self.sampling.max_tokens:
                self._live.discard(row)

    def _read(self) -> None:
        """Let the model read the last token of each row; rows that have ended leave the batch."""
        places = [place for place, row in enumerate(self._rows) if row in self._live]
        if len(places) < len(self._rows):
            self._rows = [self._rows[place] for place in places]
            self._state = select(self._state, torch.tensor(places, device=self._features.device))
        tokens = torch.tensor([[self._drawn[row][-1]] for row in self._rows], device=self._features.device)
        features, self._state = self.model.features(tokens, self._state)
        self._features = features[:, -1]


def check_vocabulary(model: RWKV, tokenizer: Tokenizer) -> None:
    """Raises: ValueError for a tokenizer with more ids than the model."""
    ids, places = tokenizer.vocab_size, model.config.vocab_size
    if places < ids:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {ids} ids, the model only {places}: choose the one it was made for"
        )


@torch.no_grad()  # not inference_mode: the state goes out, and may be trained on from there
def read(model: RWKV, texts: Sequence[np.ndarray], state: State | None = None) -> tuple[Tensor, State]:
    """Read N texts at once, packed end to end, in stretches.

    Args: texts: N arrays of ids, of any lengths, not all 0. state: N rows, or one for all; None: documents begin.
    Returns: the model's features (N, C) at the last token of each (of those that have one), and the state, N rows.
    Raises: ValueError for a state of other rows.
    """
    n, device = len(texts), next(model.parameters()).device
    if state is not None and (rows := len(state.blocks[0].att_shift)) != n:
        if rows != 1:
            raise ValueError(f"state holds {rows} sequences for {n} prompts: give one for all, or one for each")
        state = select(state, torch.zeros(n, dtype=torch.int64, device=device))
    last: Tensor | None = None
    for start in range(0, max(map(len, texts)), STRETCH):
        pieces = [text[start : start + STRETCH].astype(np.int64) for text in texts]
        borders = torch.from_numpy(np.cumsum([0, *map(len, pieces)], dtype=np.int32)).to(device)
        x, state = model.features(torch.from_numpy(np.concatenate(pieces)).to(device)[None], state, borders)
        ends = x[0, (borders[1:] - 1).clamp(min=0)]  # (N, C)
        last = ends if last is None else torch.where((borders.diff() > 0)[:, None], ends, last)
    assert last is not None and state is not None
    return last, state


def until(stops: Sequence[str], pieces: Iterator[str]) -> Generator[str, None, bool]:
    """The pieces of a text up to the first stop text; what may be the beginning of one is held back.

    Returns: whether a stop text came.
    """
    held = ""
    for piece in pieces:
        held += piece
        # Of several in one piece, the first to be complete: that does not depend on how the text is cut into pieces.
        if found := [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]:
            if text := held[: min(found)[1]]:
                yield text
            return True
        safe = len(held) - max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        if safe:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held
    return False
