"""Tokenizers of Hugging Face: a tokenizer.json, read by the library `tokenizers`."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infctx.tokenizer import to_bytes

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Tried in this order where tokenizer_config.json names no end.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<s>")


class HuggingFaceTokenizer:
    """A tokenizer.json. Text that spells a special token is that token; nothing is added to a text.

    Args:
        name: the file, a folder that holds it, or owner/name on the hub.

    Raises: ValueError or FileNotFoundError saying what is missing; also if no token ends a document.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        file = _find(name)
        content = file.read_bytes()
        self._tokenizer = _parse(content, file)
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # ids may have holes
        self.end_of_document = _end_of_document(self._tokenizer, file.parent / CONFIG)
        self.fingerprint = f"{hashlib.sha256(content).hexdigest()}, {self.end_of_document}"
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text as (n,) uint16 or uint32. Raises: ValueError for a lone surrogate, or bytes not UTF-8."""
        data = to_bytes(text)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            bad = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8"
            raise ValueError(f"{bad}, and tokenizer {self.name} reads text only") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, self._dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids of no token give nothing. Raises: ValueError for a negative id."""
        try:
            return self._tokenizer.decode([int(i) for i in ids if i != self.end_of_document])
        except OverflowError:
            raise ValueError(f"tokenizer {self.name}: token ids must be 0 or more, and below 2^32") from None

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """As `decode`, piece by piece, never breaking a character; ends with what was left over.

        One difference: a decoder with byte fallback unsays whole characters when half of one follows; here they stay.
        """
        # Many decoders treat the first token apart (they drop its space), so the tokens shown last are decoded again.
        context: list[int] = []
        pending: list[int] = []
        shown = ""
        for token in ids:
            pending.append(int(token))
            text = self.decode(context + pending)
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                context, pending = pending, []
                shown = self.decode(context)
        if rest := self.decode(context + pending)[len(shown) :]:
            yield rest


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"tokenizer {name}: the folder holds no {FILE}")
        return path / FILE
    if path.is_file():
        return path
    if name.count("/") != 1 or not all(name.split("/")):  # the hub is not asked about every slip of the pen
        choices = f"bytes, world, a {FILE}, a folder that holds one, or owner/name on the Hugging Face hub"
        raise ValueError(f"tokenizer {name!r} is not known; choose: {choices}")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(name, FILE))
        try:
            hf_hub_download(name, CONFIG)  # lies beside it then
        except LocalEntryNotFoundError:  # not asked: the hub could not be reached
            raise
        except EntryNotFoundError:
            pass
    except (OSError, ValueError, EntryNotFoundError) as error:
        why = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"tokenizer {name!r} is no file or folder, nor to be had from the hub: {why}") from None
    return file


def _parse(content: bytes, file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"tokenizer {file}: not a {FILE} of Hugging Face: {error}") from None
    tokenizer.no_truncation()  # both may be set in the file, and neither is of the text
    tokenizer.no_padding()
    return tokenizer


def _end_of_document(tokenizer: Any, config: Path) -> int:
    try:
        named = json.loads(config.read_bytes()).get("eos_token") if config.is_file() else None
    except (ValueError, AttributeError):
        raise ValueError(f"{config}: not a JSON object") from None
    if isinstance(named, dict):
        named = named.get("content")
    for token in [named] if named else ENDS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    what = f"eos_token {named!r} is not in the vocabulary" if named else "no token is known to end a document"
    raise ValueError(f'tokenizer: {what}: put {{"eos_token": "..."}} with a token of the vocabulary into {config}')
