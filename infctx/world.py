"""The RWKV World vocabulary: 65,529 pieces of bytes, and the longest match among them in pure Python.

The vocabulary is the one that the package `rwkv` ships. Ids 1 to 256 are the single bytes, so that any bytes have ids;
id 0 ends a document and is not in the file.
"""

import ast
import json
from array import array
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = "rwkv_vocab_v20230424.txt"


def vocabulary_file() -> Path:
    """The file in the package `rwkv`, found without importing its model. Raises: FileNotFoundError."""
    file = Path(str(files("rwkv") / VOCABULARY))
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer world: the package rwkv holds no {VOCABULARY}: pip install -U rwkv")
    return file


def read_vocabulary() -> list[bytes]:
    """The pieces by id, 65,530 with the empty piece of id 0. Raises: ValueError naming a line that is not sound."""
    pieces = [b""]
    for line in vocabulary_file().read_text("utf-8").splitlines():  # each: id, Python literal, length in bytes
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        piece = ast.literal_eval(literal)
        pieces.append(piece if isinstance(piece, bytes) else piece.encode())
        if int(number) != len(pieces) - 1 or int(length) != len(pieces[-1]):
            raise ValueError(f"{VOCABULARY}, line {len(pieces) - 1}: unsound: reinstall the package rwkv")
    return pieces


class LongestMatch:
    """Greedy longest match by a trie of dictionaries from a byte to the next node; a node's token, if any, is at -1."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._root: dict[int, Any] = {}
        for token, piece in enumerate(pieces):
            if piece:
                reduce(lambda node, byte: node.setdefault(byte, {}), piece, self._root)[-1] = token

    def encode(self, data: bytes) -> np.ndarray:
        """The ids of any bytes as (n,) uint16."""
        found, at = array("H"), 0
        while at < len(data):
            node: Any = self._root
            for i in range(at, len(data)):
                node = node.get(data[i])
                if node is None:
                    break
                if -1 in node:
                    token, end = node[-1], i + 1
            found.append(token)
            at = end
        return np.frombuffer(found, np.uint16) if found else np.empty(0, np.uint16)


def write_tokenizer_files(folder: str | Path) -> None:
    """Put the World tokenizer into a Hugging Face model folder: its code, its vocabulary, tokenizer_config.json.

    `transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` then gives it. Needs no transformers.
    """
    folder, code = Path(folder), files("infctx") / "hf_tokenizer.py"
    end = "<|rwkv_tokenizer_end_of_text|>"
    config = {
        "tokenizer_class": "RwkvWorldTokenizer",
        "auto_map": {"AutoTokenizer": ["hf_tokenizer.RwkvWorldTokenizer", None]},
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / code.name).write_bytes(code.read_bytes())
    (folder / VOCABULARY).write_bytes(vocabulary_file().read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
