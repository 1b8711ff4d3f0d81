"""From a record to a document: what it says, and which of its tokens are to be learnt.

Text is cut into tokens as a whole; only where a learnt stretch meets one that is not, tokens end. The mask belongs to
the target: a token that is learnt is predicted from what stands before it. What closes a learnt text is learnt with it.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from infctx.segments import Document
from infctx.sources import ROLES, Source
from infctx.templates import Parts, chatml, load_template, messages, own, part, world
from infctx.tokenizer import Tokenizer


def document(record: Any, source: Source, tokenizer: Tokenizer) -> Document:
    """What a record of a source becomes.

    Raises: ValueError saying what is wrong with the record; where it stands is for the caller to say.
    """
    if source.callable:
        return _called(record, source, tokenizer)
    if source.format == "binidx":
        return binidx(record, tokenizer)
    if source.format == "messages" and source.template == "tokenizer":
        parts = own(messages(_conversation(record, source)), load_template(tokenizer.name)[1], source.learn_prefix)
        return encode(parts, tokenizer, close=False)  # its own last words close it
    return encode(PARTS[source.format](record, source), tokenizer)


def encode(parts: Parts, tokenizer: Tokenizer, close: bool = True) -> Document:
    """Tokens of stretches of text, closed by an end of document that is learnt if the last stretch is."""
    runs = [
        ("".join(text for text, _ in run), learnt)
        for learnt, run in groupby((p for p in parts if p[0]), lambda p: p[1])
    ]
    try:
        ids = [tokenizer.encode(text) for text, _ in runs] or [tokenizer.encode("")]
    except ValueError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{error}: mend the file") from None
    mask = [np.full(len(x), learnt) for x, (_, learnt) in zip(ids, runs, strict=False)]
    if close:
        ids.append(np.array([tokenizer.end_of_document], ids[0].dtype))
        mask.append(np.array([runs[-1][1] if runs else False]))
    if all(learnt for _, learnt in runs):
        return Document(np.concatenate(ids))
    return Document(np.concatenate(ids), np.concatenate(mask))


def text(record: Any, source: Source) -> Parts:
    """All of a column."""
    return [(_field(record, source.column or "text", "column"), True)]


def columns(record: Any, source: Source) -> Parts:
    """Columns one after another, each in its prefix and suffix; an empty or null one is left out with them."""
    parts: Parts = []
    learn = source.column_names[-1:] if source.learn is None else source.learn
    for name, (prefix, suffix) in zip(source.column_names, source.affixes, strict=True):
        if isinstance(record, Mapping) and name in record and record[name] is None:
            continue
        if content := _field(record, name, "columns"):
            parts += part(prefix, content, suffix, name in learn, source.learn_prefix)
    return parts


def conversation(record: Any, source: Source) -> Parts:
    """Messages in a template of ours."""
    learn = {ROLES[role] for role in source.learn or ["assistant"]}
    template = chatml if source.template == "chatml" else world
    return template(messages(_conversation(record, source)), sorted(learn), source.learn_prefix)


PARTS: dict[str, Callable[[Any, Source], Parts]] = {
    "text": text, "jsonl": text, "completion": columns, "instruction": columns, "messages": conversation,
}  # fmt: skip


def binidx(tokens: np.ndarray, tokenizer: Tokenizer) -> Document:
    """Tokens as they are. Raises: ValueError for one that the tokenizer does not have."""
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        bad = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise ValueError(f"token id {bad} is not of tokenizer {tokenizer.name} (0 to {tokenizer.vocab_size - 1}): "
                         "set data.tokenizer to the one it was made with")  # fmt: skip
    return Document(tokens)


def shorten(whole: Document, source: Source) -> list[Document]:
    """A document, or those that it is split into: the next begins with the last token of the one before.

    A first token is no target, so each target of the whole is one of exactly one piece. None are left of a document
    that is dropped. Raises: ValueError if it is too long and that is refused.
    """
    size, most = len(whole.tokens), source.max_tokens
    if most is None or size <= most:
        return [whole]
    if source.too_long == "refuse":
        raise ValueError(f"{size:,} tokens are more than data.source.max_tokens ({most:,}): "
                         "raise it, or set data.source.too_long to split or drop")  # fmt: skip
    if source.too_long == "drop":
        return []
    spans = [slice(i, i + most) for i in range(0, size - 1, most - 1)]
    return [Document(whole.tokens[x], None if whole.mask is None else whole.mask[x]) for x in spans]


def targets(made: Document) -> int:
    """Tokens to be learnt; the first one is never predicted."""
    return max(len(made.tokens) - 1, 0) if made.mask is None else int(made.mask[1:].sum())


@lru_cache(maxsize=8)
def load_function(name: str) -> tuple[Callable[[Any, Tokenizer], Any], bytes]:
    """A user's function, of a module in the working folder or installed, and the file it is written in.

    The file is part of the digest of what the function makes; modules that it imports are not.
    Raises: ValueError if it cannot be had.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
        takes = len(inspect.signature(function).parameters)
        written = Path(str(sys.modules[module].__file__)).read_bytes()
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"data.source.format {name}: cannot be loaded: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if takes not in (1, 2):
        raise ValueError(f"data.source.format {name}: it must take a record, or a record and the tokenizer")
    return (function if takes == 2 else lambda record, _: function(record)), written


def _called(record: Any, source: Source, tokenizer: Tokenizer) -> Document:
    """What a user's function gives, as arrays. Raises: ValueError if it fails, or that is no document."""
    name = f"data.source.format {source.format}"
    function = load_function(source.format)[0]
    try:
        made = function(record, tokenizer)
    except Exception as error:  # a user's function may raise anything
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}: mend the function or the record") from error
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"{name} must return a Document(tokens, mask), got {type(made).__name__}")
    tokens = np.asarray(made[0])
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise ValueError(f"{name}: tokens must be a list of ids, got {tokens.dtype} of shape {tokens.shape}")
    mask = None if made[1] is None else np.asarray(made[1], bool)
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"{name}: {len(tokens)} tokens and {mask.size} of the mask: there must be one for each")
    return Document(binidx(tokens, tokenizer).tokens, mask)


def _conversation(record: Any, source: Source) -> Any:
    names = [source.column] if source.column else ["messages", "conversations"]
    for name in names:
        if isinstance(record, Mapping) and name in record:
            return record[name]
    return _field(record, names[0], "column")


def _field(record: Any, column: str, option: str) -> str:
    if not isinstance(record, Mapping) or column not in record:
        found = ", ".join(map(repr, list(record)[:5])) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"no key {column!r}; found: {found}: name what is there in data.source.{option}")
    if not isinstance(record[column], str):
        raise ValueError(f"{column!r} must be a string, got {type(record[column]).__name__}: mend the record")
    return record[column]
