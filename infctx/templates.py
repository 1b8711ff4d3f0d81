"""Conversations as text: messages in a template, in parts that are to be learnt or not."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from infctx.sources import ROLES

Parts = list[tuple[str, bool]]  # stretches of a text, and whether they are to be learnt
Message = dict[str, Any]  # with role, in the words of OpenAI, and content
NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}  # of template world


def part(prefix: str, text: str, suffix: str, learnt: bool, learn_prefix: bool) -> Parts:
    """A text between what stands around it. Where it ends is learnt with it, how it is begun only if asked.

    A space that ends a prefix is learnt with the text: tokenizers hold it together with the word that follows, and so
    does what a model is asked to continue.
    """
    if not learnt or learn_prefix:
        return [(prefix + text + suffix, learnt)]
    bare = prefix.removesuffix(" ")
    return [(bare, False), (prefix[len(bare) :] + text + suffix, True)]


def clean(text: str) -> str:
    """A text that no empty line ends before its time: runs of newlines are one, and there is no space around."""
    return re.sub(r"(\r?\n)+", "\n", text).strip()


def messages(given: Any) -> list[Message]:
    """The messages of a conversation, of OpenAI (role, content) or ShareGPT (from, value).

    Raises: ValueError for anything else.
    """
    if not isinstance(given, list) or not given:
        raise ValueError(
            f"a conversation must be a list of messages, got {given if given == [] else type(given).__name__}"
        )
    found = []
    for number, message in enumerate(given, 1):
        keys = ("from", "value") if isinstance(message, Mapping) and "from" in message else ("role", "content")
        if not isinstance(message, Mapping) or any(key not in message for key in keys):
            raise ValueError(f"message {number} must have role and content, or from and value")
        role = message[keys[0]]
        if str(role) not in ROLES:
            raise ValueError(f"message {number}: role {role!r} is not known; known are: {', '.join(ROLES)}")
        found.append({**message, "role": ROLES[role], "content": _content(message[keys[1]], number)})
    return found


def _content(content: Any, number: int) -> str:
    """Text, also where it comes in parts."""
    if isinstance(content, list):
        parts = [x for x in content if isinstance(x, Mapping) and x.get("type", "text") == "text"]
        texts = [x["text"] for x in parts if isinstance(x.get("text"), str)]
        if len(texts) == len(content):
            return "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"message {number}: its content must be text, got {type(content).__name__}")
    return content


def world(conversation: Sequence[Message], learn: Sequence[str], learn_prefix: bool) -> Parts:
    """`User: ...`, an empty line, `Assistant: ...`, an empty line: exactly what `infctx chat` reads.

    As there, an empty line ends a turn: none is left inside one, but in replies, whose thoughts hold some.
    """
    parts = []
    for number, message in enumerate(conversation, 1):
        role, text = message["role"], message["content"]
        if role not in NAMES:
            raise ValueError(f"message {number}: template world has no role {role!r}: use template chatml or tokenizer")
        text = text.strip() if role == "assistant" else clean(text)
        parts += part(f"{NAMES[role]}: ", text, "\n\n", role in learn, learn_prefix)
    return parts


def chatml(conversation: Sequence[Message], learn: Sequence[str], learn_prefix: bool) -> Parts:
    """`<|im_start|>user`, a new line, the text, `<|im_end|>`, a new line."""
    parts = []
    for message in conversation:
        role = message["role"]
        parts += part(f"<|im_start|>{role}\n", message["content"], "<|im_end|>\n", role in learn, learn_prefix)
    return parts


def own(conversation: Sequence[Message], render: Callable[..., str], learn_prefix: bool) -> Parts:
    """A tokenizer's own template: a reply is what it adds to the text that asks for one.

    Args:
        render: (messages, add_generation_prompt) -> text.
    Raises: ValueError if the template fails, or later messages change what it made of earlier ones.
    """
    parts: Parts = []
    done, whole = "", render(conversation, False)
    for i, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        asked = render(conversation[:i], not learn_prefix) if i or not learn_prefix else ""
        said = render(conversation[: i + 1], False)
        if not (whole.startswith(said) and said.startswith(asked) and asked.startswith(done)):
            raise ValueError(f"message {i + 1}: the tokenizer's chat template writes it otherwise when others follow: "
                             "use template chatml or world")  # fmt: skip
        parts += [(asked[len(done) :], False), (said[len(asked) :], True)]
        done = said
    return [*parts, (whole[len(done) :], False)]


@lru_cache(maxsize=2)
def load_template(tokenizer: str) -> tuple[str, Callable[..., str]]:
    """The chat template of a tokenizer of Hugging Face: its source, and what renders messages.

    Raises: ValueError if there is none.
    """
    if tokenizer in ("bytes", "world"):
        raise ValueError(
            f"data.source.template: tokenizer {tokenizer} has no chat template: use template world or chatml"
        )
    try:
        import jinja2
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"data.source.template tokenizer needs transformers and jinja2: pip install them ({error})"
        ) from None
    folder = Path(tokenizer).parent if Path(tokenizer).is_file() else tokenizer
    try:
        found = AutoTokenizer.from_pretrained(folder)
        source = found.get_chat_template()
    except Exception as error:  # whatever the library, the hub or the network raises
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"data.source.template: tokenizer {tokenizer} gives no chat template: {why}: "
                         "use template world or chatml") from None  # fmt: skip

    def render(conversation: Sequence[Message], ask: bool) -> str:
        try:
            return str(found.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=ask))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"the tokenizer's chat template refuses it: {error}: use template chatml or world"
            ) from None

    return source, render
