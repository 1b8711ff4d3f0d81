"""The World tokenizer in an exported folder: transformers gives the ids and the text that this package gives."""

import sys

import pytest
import transformers.dynamic_module_utils
from test_tokenizer import strings
from transformers import AutoTokenizer

from infctx.tokenizer import WorldTokenizer
from infctx.world import write_tokenizer_files

END = "<|rwkv_tokenizer_end_of_text|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer_files(folder)
    return folder


@pytest.fixture
def theirs(folder, tmp_path, monkeypatch):
    return load(folder, tmp_path, monkeypatch)


def load(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_folder_stands_alone(folder):
    assert sorted(x.name for x in folder.iterdir()) == [
        "hf_tokenizer.py",
        "rwkv_vocab_v20230424.txt",
        "tokenizer_config.json",
    ]
    assert "infctx" not in (folder / "hf_tokenizer.py").read_text()


def test_equals_world(theirs, tmp_path, monkeypatch):
    ours = WorldTokenizer()
    theirs.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", tmp_path, monkeypatch)
    for text in [*strings(2000, seed=0), "  leading", "trailing \n ", "a , b . c 's n't", ""]:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == again(text)["input_ids"] == theirs.encode(text) == ids, repr(text)
        assert theirs.decode(ids) == again.decode(ids) == text
        for cut in range(0, len(ids), 3):
            assert theirs.decode(ids[:cut]) == ours.decode(ids[:cut])


def test_facts(theirs):
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
    assert (len(theirs), theirs.vocab_size, len(theirs.get_vocab())) == (65530, 65530, 65530)
    assert theirs.decode([33155, 0], skip_special_tokens=True) == "Hello"
    assert theirs.decode([33155, 0, 65535]) == f"Hello{END}\ufffd"
    assert theirs(f"Hello{END} ")["input_ids"] == [33155, 0, 33]
    batch = theirs(["Hello", "Hello there"], padding=True)
    assert batch["input_ids"][0] == [33155, 0] and batch["attention_mask"][0] == [1, 0]
    assert theirs.convert_ids_to_tokens(theirs.convert_tokens_to_ids(["no such token", "Hello"])[1:]) == ["Hello"]


def test_added_tokens_follow_the_vocabulary(theirs):
    theirs.add_tokens(["<|user|>"], special_tokens=True)
    ids = theirs("Hello<|user|> ")["input_ids"]
    assert ids == [33155, 65530, 33]
    assert theirs.decode(ids) == "Hello<|user|> "
