"""The commands that make text."""

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from infctx.chat import Conversation, check_name
from infctx.generate import Stream, read
from infctx.models.rwkv import RWKV
from infctx.sampling import Sampling
from infctx.statefile import load_state
from infctx.statefile import save_state as write_state
from infctx.tokenizer import Tokenizer, load_tokenizer
from infctx.weights import load_model

VOCABULARIES = {257: "bytes", 65536: "world"}
TALK = {  # what can be typed in place of a turn
    "/reset": "forget all turns",
    "/save FILE": "write the conversation to a .safetensors file; chat --state goes on from it",
    "/quit": "end",
    "/help": "this list",
}
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


def generate(
    model: str, prompt: str = "", prompts: str | None = None, max_tokens: int = 256, state: str | None = None,
    save_state: str | None = None, batch_size: int = 16, tokenizer: str = "auto", kernel: str = "auto",
    dtype: Dtype | None = None, device: Device = "auto", **sampling: Any,
) -> None:  # fmt: skip
    """Print a text and what the model makes follow it.

    Args:
        model: weights: .pth, .safetensors, Hugging Face folder, checkpoint or run folder.
        prompt: the beginning.
        prompts: file with a prompt a line; each gives a line of JSON. Prompt r, from 0, draws by seed + r.
        max_tokens: at most this many tokens follow.
        state: state file that goes before the prompt, or before each one.
        save_state: file for the state after the prompt and its text: .safetensors; .pth: without the token shifts.
        batch_size: prompts of the file that are continued together.
        tokenizer: bytes, world, or one of Hugging Face; auto: the one that the model's vocabulary is of.
        kernel: backend of the recurrence.
        dtype: of the weights in memory; left out: as in the file.
        device: auto is cuda where there is one.
    """
    settings = Sampling(max_tokens=max_tokens, **sampling)
    if prompts is not None and (prompt or save_state):
        raise ValueError("prompts: leave out prompt and save_state, or give one prompt in place of the file")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lines = [prompt] if prompts is None else _prompts(Path(prompts))
    net, words = _load(model, tokenizer, kernel, dtype, device)
    before = load_state(state, net)[0] if state else None
    if prompts is not None:
        for start in range(0, len(lines), batch_size):
            group = lines[start : start + batch_size]
            _print_json(Stream(net, words, group, replace(settings, seed=settings.seed + start), before), group)
        return
    stream = Stream(net, words, lines, settings, before)  # errors come before the prompt is repeated
    print(prompt, end="", flush=True)
    _print_pieces(piece for _, piece in stream)
    if save_state:
        write_state(stream.state(), save_state, {"arch": net.config.arch})


def chat(
    model: str, system: str = "", think: bool = False, tools: str | None = None, state: str | None = None,
    save_state: str | None = None, max_tokens: int = 1024, top_p: float = 0.5, tokenizer: str = "auto",
    kernel: str = "auto", dtype: Dtype | None = None, device: Device = "auto", **sampling: Any,
) -> None:  # fmt: skip
    """Talk with a model that knows the User/Assistant templates: a line a turn; /reset, /save FILE, /quit, /help.

    Args:
        model: weights: .pth, .safetensors, Hugging Face folder, checkpoint or run folder.
        system: text before the first turn.
        think: let replies begin with a thought.
        tools: JSON file with a list of functions; replies are calls of them.
        state: state file to go on from: a conversation, or what goes before a new one.
        save_state: file (.safetensors) for the conversation at its end.
        max_tokens: at most this many tokens in a reply.
        top_p: draw from the fewest tokens that hold this probability.
        tokenizer: bytes, world, or one of Hugging Face; auto: the one that the model's vocabulary is of.
        kernel: backend of the recurrence.
        dtype: of the weights in memory; left out: as in the file.
        device: auto is cuda where there is one.
    """
    settings = Sampling(max_tokens=max_tokens, top_p=top_p, **sampling)
    functions = _tools(Path(tools)) if tools else None
    if save_state:
        check_name(save_state)  # now, not after a long conversation
    net, words = _load(model, tokenizer, kernel, dtype, device)
    if state:
        conversation = Conversation.load(state, net, words, settings, system, think, functions)
    else:
        conversation = Conversation(net, words, settings, system, think, functions)
    read(net, [np.zeros(1, np.int64)])  # what is said of kernels comes before the talk, not into a reply
    _talk(conversation, _typed())
    if save_state:
        conversation.save(save_state)


def _talk(conversation: Conversation, lines: Iterable[str]) -> None:
    for line in lines:
        command, _, path = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
        elif command == "/save":
            _save(conversation, path.strip())
        elif command == "/help":
            print("\n".join(f"{name:<11} {what}" for name, what in TALK.items()))
        elif re.fullmatch(r"/\w*", command):  # a path has more of them
            print(f"{command}: there is no such command; there are: {', '.join(TALK)}")
        elif command:
            print("Assistant: ", end="", flush=True)
            _print_pieces(conversation.ask(line))
            print()


def _save(conversation: Conversation, path: str) -> None:
    """A name that does not do is no reason to lose the conversation."""
    try:
        conversation.save(path)
        print(f"state: {path}")
    except (ValueError, OSError) as error:
        print(f"not saved: {error}")


def _print_pieces(pieces: Iterable[str]) -> None:
    """Control-C ends a text, not the program."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()


def _typed() -> Iterator[str]:
    """What is typed or piped in; a line in another encoding is no reason to lose the conversation."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("User: " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if any("\udc80" <= x <= "\udcff" for x in line):
            print(f"not read: the line is not {sys.stdin.encoding} text")
        else:
            yield line


def _print_json(stream: Stream, prompts: list[str]) -> None:
    for _ in stream:
        pass
    for prompt, text in zip(prompts, stream.texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def _prompts(file: Path) -> list[str]:
    lines = _text(file).removesuffix("\n").split("\n")
    if "" in lines:
        raise ValueError(f"{file}: line {lines.index('') + 1} is empty; each line is a prompt")
    return lines


def _tools(file: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f'{file}: tools are a JSON list of objects: [{{"name": ..., "description": ...}}, ...]')
    return tools


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _load(model: str, tokenizer: str, kernel: str, dtype: Dtype | None, device: Device) -> tuple[RWKV, Tokenizer]:
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("device cuda: torch finds none here; leave it out, or install torch for CUDA")
    place = "cuda" if cuda and device != "cpu" else "cpu"
    net = load_model(model, getattr(torch, dtype) if dtype else None, place, kernel).eval()
    return net, load_tokenizer(_vocabulary(net) if tokenizer == "auto" else tokenizer)


def _vocabulary(model: RWKV) -> str:
    size = model.config.vocab_size
    if size not in VOCABULARIES:
        raise ValueError(f"tokenizer: no vocabulary of {size} ids is known: say which one the model was trained with")
    return VOCABULARIES[size]
