"""The RWKV World tokenizer for Hugging Face transformers: longest match over bytes, exact for any text.

Exported model folders hold a copy of this file beside the vocabulary, so it stands alone. A token's string is its
bytes read as Latin-1: also a part of a character has one. Use: AutoTokenizer.from_pretrained(folder,
trust_remote_code=True).
"""

import ast
from functools import reduce
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

VOCABULARY = "rwkv_vocab_v20230424.txt"
END = "<|rwkv_tokenizer_end_of_text|>"  # how id 0 is spelled: it has no bytes of its own
UNUSED = "\ufffd".encode().decode("latin-1")  # rows of a model that no token belongs to


class RwkvWorldTokenizer(PreTrainedTokenizer):
    """Ids 0 to 65529. Id 0 begins, ends and pads; nothing is added to a text.

    Args:
        vocab_file: lines of id, Python literal and length in bytes.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012 (as transformers has it)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    _auto_class = "AutoTokenizer"  # save_pretrained puts this file beside the vocabulary

    def __init__(
        self, vocab_file: str, bos_token: Any = END, eos_token: Any = END, pad_token: Any = END, **options: Any
    ) -> None:
        self.vocab_file = vocab_file
        self._tokens = [END]
        for line in Path(vocab_file).read_text("utf-8").splitlines():
            piece = ast.literal_eval(line[line.index(" ") + 1 : line.rindex(" ")])
            self._tokens.append((piece if isinstance(piece, bytes) else piece.encode()).decode("latin-1"))
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self._root: dict[str, Any] = {}  # a trie: the next node by character, and at "" the token that ends here
        for token in self._tokens[1:]:
            reduce(lambda node, byte: node.setdefault(byte, {}), token, self._root)[""] = token
        self._added_tokens_decoder = {0: AddedToken(END, special=True, normalized=False)}
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **options)

    @property
    def vocab_size(self) -> int:
        """Tokens without those that a user has added."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Token to id, with those that a user has added."""
        return self._ids | self._added_tokens_encoder

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; what is not valid UTF-8 becomes U+FFFD."""
        added = self._added_tokens_encoder
        data = b"".join(token.encode() if token in added else token.encode("latin-1") for token in tokens)
        return data.decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the vocabulary file; returns its path."""
        file = Path(save_directory, f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY)
        file.write_bytes(Path(self.vocab_file).read_bytes())
        return (str(file),)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        data, tokens, at = text.encode().decode("latin-1"), [], 0
        while at < len(data):
            node: Any = self._root
            token = ""
            for i in range(at, len(data)):
                node = node.get(data[i])
                if node is None:
                    break
                token = node.get("", token)
            tokens.append(token)
            at += len(token)
        return tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else UNUSED
