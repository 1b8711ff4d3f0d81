"""A conversation in the templates of the RWKV World and G1 models.

Two newlines end a turn, which is `System: ...`, `User: ...` or `Assistant: ...`. The state is always that of the
transcript as one would write it: no half of a stop text, nothing after it, no tokens cut otherwise than in a document.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infctx.generate import Stream, check_vocabulary, read
from infctx.models.rwkv import RWKV
from infctx.sampling import Sampling
from infctx.state import State
from infctx.statefile import load_state, save_state
from infctx.templates import clean
from infctx.tokenizer import Tokenizer

STOPS = ("\n\nUser:", "\n\nSystem:", "\n\nAssistant:")  # empty lines alone do not end a reply: thoughts hold them
THINK, CALL = "<think", "```json"  # how a reply begins when it is to be a thought and an answer, or a call of a tool
KIND = "conversation"  # in the facts of a state file


class Conversation:
    """Questions and replies in a state that does not grow; `turns` counts them, `reply` is the last one.

    Args:
        sampling: of the replies; STOPS are added to its stop texts, and turn t (from 0) draws by seed + t.
        system: a text before the first turn.
        think: replies are a thought and an answer; see `split_thought`.
        tools: descriptions of functions, told after the system text; replies are calls of them.
        state: what goes before all this, one row.
    Raises: ValueError for think together with tools, or more ids in the tokenizer than in the model.
    """

    def __init__(
        self, model: RWKV, tokenizer: Tokenizer, sampling: Sampling, system: str | None = None, think: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, state: State | None = None,
    ) -> None:  # fmt: skip
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._prefix = _prefix(think, bool(tools))
        self.state, self.turns, self.reply = state or model.initial_state(1), 0, ""
        if heading := _heading(system, tools):
            self._read(f"System: {heading}\n\n", self.state)
        self._start = self.state, self.turns

    @classmethod
    def load(
        cls, path: str | Path, model: RWKV, tokenizer: Tokenizer, sampling: Sampling, system: str | None = None,
        think: bool = False, tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> "Conversation":  # fmt: skip
        """Go on with a saved conversation; a state file of another kind goes before a new one.

        Raises: ValueError for a file that is no state of this model, or system text or tools once it has begun.
        """
        state, facts = load_state(path, model)
        if facts.get("kind") != KIND:
            return cls(model, tokenizer, sampling, system, think, tools, state)
        if system or tools:
            raise ValueError(f"{path}: system and tools were said when this conversation began: leave them out")
        conversation = cls(model, tokenizer, sampling, state=state)
        conversation._prefix = _prefix(think, facts["tools"] == "true")
        conversation.turns = int(facts["turns"])
        conversation._start = state, conversation.turns
        return conversation

    def save(self, path: str | Path) -> None:
        """Write the state after the last whole turn to a file. Raises: ValueError if its suffix is not .safetensors."""
        tools, arch = str(self._prefix == CALL).lower(), self.model.config.arch
        facts = {"kind": KIND, "turns": str(self.turns), "tools": tools, "arch": arch}
        save_state(self.state, check_name(path), facts)

    def reset(self) -> None:
        """Forget all turns since the beginning, or since it was loaded."""
        self.state, self.turns = self._start
        self.reply = ""

    def ask(self, text: str) -> Iterator[str]:
        """The reply to a text, in pieces as they come.

        At its end, or where the caller closes it, the turn is read as it was given out, without space around it.
        Raises: ValueError for an empty text.
        """
        if not (text := clean(text)):
            raise ValueError("text must not be empty: there is nothing to reply to")
        prompt = f"User: {text}\n\nAssistant: {self._prefix}".rstrip()
        sampling = replace(self.sampling, stop=self.sampling.stops + STOPS, seed=self.sampling.seed + self.turns)
        stream = Stream(self.model, self.tokenizer, [prompt], sampling, self.state)
        self.reply = self._prefix
        try:
            if self._prefix:
                yield self._prefix
            for _, piece in stream:
                piece = piece if self.reply else piece.lstrip()
                self.reply += piece
                if piece:
                    yield piece
        finally:
            self.reply = self.reply.strip()
            turn = f"User: {text}\n\nAssistant: {self.reply}".rstrip() + "\n\n"
            self._read(turn[len(prompt) :], stream.prompt_state)
            self.turns += 1

    def _read(self, text: str, state: State) -> None:
        self.state = read(self.model, [self.tokenizer.encode(text)], state)[1]


def check_name(path: str | Path) -> Path:
    """Where a conversation can be saved. Raises: ValueError for another suffix than .safetensors."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a conversation is kept as .safetensors; end the name so")
    return path


def split_thought(reply: str) -> tuple[str, str]:
    """The thought and the answer of a reply; one that never stopped thinking has no answer."""
    if not reply.startswith(THINK):
        return "", reply
    thought, _, answer = reply.partition("</think>")
    return thought.removeprefix(THINK).removeprefix(">").strip(), answer.strip()


def _prefix(think: bool, tools: bool) -> str:
    if think and tools:
        raise ValueError("think and tools do not go together: a reply is a thought and an answer, or a call")
    return THINK if think else CALL if tools else ""


def _heading(system: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
    lines = [clean(system or "")]
    if tools:
        lines += ["Tools:", json.dumps(list(tools), ensure_ascii=False), "Return only a JSON function call."]
    return "\n".join(line for line in lines if line)
