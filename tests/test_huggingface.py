"""Tokenizers trained here and read back: exact ids, no half characters, no lost spaces; errors say the mend."""

import json

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from infctx.documents import Source, prepare
from infctx.huggingface import HuggingFaceTokenizer
from infctx.tokenizer import load_tokenizer

TEXT = "Hello world, it's the end.  Two spaces\n\tand a tab; naïve café, 日本語 and 🐢🐢 in the world.\n" * 3
END = "<|endoftext|>"


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )


def byte_fallback():
    """As Llama has it: what is no token is spelled in bytes, and the first space is dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "w", "l", "o", "▁w", "lo"]
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, [("l", "o"), ("▁", "w")], unk_token="<unk>",
                                     byte_fallback=True, fuse_unk=True))  # fmt: skip
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer, None


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[EOS]"], show_progress=False)


KINDS = {x.__name__: x for x in (byte_level, metaspace, byte_fallback, word_piece)}


def save(folder, kind="byte_level", config=None, change=lambda tokenizer: None):
    tokenizer, trainer = KINDS[kind]()
    if trainer:
        tokenizer.train_from_iterator([TEXT], trainer)
    change(tokenizer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text(tmp_path, kind):
    theirs, ours = save(tmp_path, kind), HuggingFaceTokenizer(str(tmp_path))
    ids = ours.encode(TEXT)
    assert ids.dtype == np.uint16
    assert ids.tolist() == theirs.encode(TEXT, add_special_tokens=False).ids == ours.encode(TEXT.encode()).tolist()
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.decode(ids) == theirs.decode(ids.tolist())
    if kind in ("byte_level", "byte_fallback"):
        assert ours.decode(ids) == TEXT
    assert ours.decode([*ids[:5], ours.end_of_document, ours.vocab_size + 1]) == ours.decode(ids[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_decode_in_whole_characters(tmp_path, kind):
    save(tmp_path, kind)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    ids, end = tokenizer.encode(TEXT).tolist(), tokenizer.end_of_document
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > len(ids) / 5
    assert not any("\ufffd" in piece for piece in pieces)
    for cut in range(60):
        text = "".join(tokenizer.stream(iter(ids[:cut])))
        assert text.rstrip("\ufffd") == tokenizer.decode(ids)[: len(text.rstrip("\ufffd"))]
        if kind != "byte_fallback":  # that decoder unsays whole characters when half of one follows them
            assert text == tokenizer.decode(ids[:cut])
        assert "".join(tokenizer.stream([*ids[:cut], end, *ids[cut:]])) == tokenizer.decode(ids)  # the space stays


def test_what_is_no_character_is_held_back_until_it_is_known(tmp_path):
    save(tmp_path)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    fox, letter, y = (tokenizer.encode(x).tolist() for x in ("🦊", "a", "ÿ"))  # not in the text it was trained on
    assert list(tokenizer.stream(tokenizer.encode("a\ufffdb").tolist())) == ["a", "\ufffdb"]
    assert list(tokenizer.stream([*fox[:-1], *letter])) == ["\ufffda"]
    assert list(tokenizer.stream([*letter, *y[:1]])) == ["a", "\ufffd"]
    assert list(tokenizer.stream([*letter, *fox, *y])) == ["a", "🦊", "ÿ"]


@pytest.mark.parametrize("config, end", [
    ({"eos_token": "<|stop|>"}, "<|stop|>"), ({"eos_token": {"content": "<|stop|>"}}, "<|stop|>"),
    ({"eos_token": None}, END), (None, END)])  # fmt: skip
def test_the_end_of_a_document(tmp_path, config, end):
    theirs = save(
        tmp_path, config=config, change=lambda x: x.add_special_tokens([AddedToken("<|stop|>", special=True)])
    )
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert HuggingFaceTokenizer(str(name)).end_of_document == theirs.token_to_id(end)


def test_nothing_is_added_padded_or_cut(tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=64)
        tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A {END}", None, [(END, 0)])

    save(tmp_path, change=change)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert 0 not in tokenizer.encode(TEXT)
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode(f"a{END}").tolist() == [*tokenizer.encode("a"), 0]  # spelled in the text: that token


def test_ids_with_holes_and_more_than_uint16(tmp_path):
    save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["🐢"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.encode("a").dtype == np.uint32


def test_prepared_data_is_stale_when_the_tokenizer_changes(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    source, name = Source(str(tmp_path / "a.txt")), str(tmp_path / "words")
    save(tmp_path / "words")
    first = prepare(source, load_tokenizer(name), tmp_path / "out")
    tokenizer = HuggingFaceTokenizer(name)
    assert first.tokens(0, 0, 10**6).tolist() == [*tokenizer.encode(TEXT).tolist(), 0]
    digest = first.digest
    assert prepare(source, load_tokenizer(f"{name}/tokenizer.json"), tmp_path / "out").digest == digest
    content = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-20]
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(content))
    assert prepare(source, load_tokenizer(name), tmp_path / "out").digest != digest


def test_errors_of_encode_and_decode(tmp_path):
    save(tmp_path)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"byte 1 \(0xff\) is not UTF-8"):
        tokenizer.encode(b"a\xff")
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="token ids must be 0 or more"):
        tokenizer.decode([-1])


def test_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder holds no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json of Hugging Face: "):
        load_tokenizer(str(tmp_path))
    save(tmp_path, config={"eos_token": "<none>"})
    with pytest.raises(
        ValueError, match=r"eos_token '<none>' is not in the vocabulary: put .* into .*tokenizer_config"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not a JSON object"):
        load_tokenizer(str(tmp_path))
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "b.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no token is known to end a document: put "):
        load_tokenizer(str(tmp_path / "b.json"))


def hub(monkeypatch, answers):
    def download(name, file):
        if isinstance(answers[file], Exception):
            raise answers[file]
        return str(answers[file])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_the_hub(tmp_path, monkeypatch):
    save(tmp_path, config={"eos_token": END})
    files = {x: tmp_path / x for x in ("tokenizer.json", "tokenizer_config.json")}
    gone, offline = EntryNotFoundError("404"), LocalEntryNotFoundError("no connection\nand much more")
    hub(monkeypatch, files)
    assert load_tokenizer("owner/name").end_of_document == 0
    hub(monkeypatch, {**files, "tokenizer_config.json": gone})
    assert load_tokenizer("owner/name").name == "owner/name"
    for answers in ({"tokenizer.json": gone}, {**files, "tokenizer_config.json": offline}, {"tokenizer.json": offline}):
        hub(monkeypatch, answers)
        with pytest.raises(
            ValueError, match=r"tokenizer 'owner/name' is no file or folder, nor .* the hub: (404|no connection)$"
        ):
            load_tokenizer("owner/name")
