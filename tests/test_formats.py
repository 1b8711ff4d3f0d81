"""What is learnt of a record, token by token; where tokens end; what splitting keeps."""

import json
import sys

import numpy as np
import pytest

from infctx.formats import columns, document, encode, load_function, shorten, targets
from infctx.segments import Document
from infctx.sources import Source
from infctx.templates import load_template, messages, part
from infctx.tokenizer import ByteTokenizer, WorldTokenizer, load_tokenizer

BYTES, WORLD = ByteTokenizer(), WorldTokenizer()
END = "∎"  # how the end of a document is shown
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"}]  # fmt: skip
SHARE = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"},
         {"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]  # fmt: skip


def shown(made, tokenizer):
    """Each token as text, and whether it is learnt."""
    mask = np.ones(len(made.tokens), bool) if made.mask is None else made.mask
    assert len(mask) == len(made.tokens)
    end = tokenizer.end_of_document
    return [(END if t == end else tokenizer.decode([t]), bool(m)) for t, m in zip(made.tokens.tolist(), mask)]


def by_byte(record, **options):
    """The text of a document of bytes, and under it an x for each byte that is learnt."""
    pairs = shown(document(record, Source("x", **options), BYTES), BYTES)
    return "".join(t for t, _ in pairs), "".join(".x"[m] for _, m in pairs)


def by_word(record, **options):
    """Tokens of the World vocabulary; what is learnt in angle brackets."""
    pairs = shown(document(record, Source("x", **options), WORLD), WORLD)
    return [f"<{t}>" if m else t for t, m in pairs]


def test_text_and_jsonl_learn_all():
    for options in ({}, {"format": "jsonl"}, {"column": "text"}):
        assert by_byte({"text": "ab"}, **options) == ("ab∎", "xxx")
    assert by_byte({"b": "ab", "text": 1}, column="b") == ("ab∎", "xxx")
    assert document({"text": "ab"}, Source("x"), BYTES).mask is None
    assert by_word({"text": "A house"}) == ["<A>", "< house>", "<∎>"]


def test_completion():
    record = {"prompt": "1+1=", "completion": "2", "q": "Q", "a": "A"}
    assert by_byte(record, format="completion") == (
        "1+1=2∎",
        "....xx",
    )
    assert by_byte(record, format="completion", columns=["q", "a"], suffix=[" -> ", "\n"]) == (
        "Q -> A\n∎",
        ".....xxx",
    )
    assert by_byte(record, format="completion", learn=["prompt", "completion"]) == ("1+1=2∎", "xxxxxx")
    assert by_byte(record, format="completion", learn=["prompt"]) == ("1+1=2∎", "xxxx..")
    assert by_word({"prompt": "The sky is", "completion": " blue."}, format="completion") == [
        "The", " sky", " is", "< blue>", "<.>", "<∎>",
    ]  # fmt: skip


def test_instruction():
    record = {"instruction": "Add", "input": "1 1", "output": "2"}
    assert by_byte(record, format="instruction") == (
        "Instruction: Add\n\nInput: 1 1\n\nResponse: 2∎",
        "." * len("Instruction: Add\n\nInput: 1 1\n\nResponse:") + "x" * len(" 2∎"),
    )
    for nothing in ("", None):
        assert by_byte(record | {"input": nothing}, format="instruction") == (
            "Instruction: Add\n\nResponse: 2∎",
            "." * len("Instruction: Add\n\nResponse:") + "x" * len(" 2∎"),
        )
    assert by_word(record | {"input": ""}, format="instruction") == [
        "Instruction", ":", " Add", "\n\n", "Response", ":", "< 2>", "<∎>",
    ]  # fmt: skip


def test_prefixes_suffixes_and_what_is_learnt_are_set():
    record = {"q": "a", "t": "b", "a": "c"}
    options = {
        "format": "instruction",
        "columns": ["q", "t", "a"],
        "prefix": ["Q:", "T: ", "A: "],
        "suffix": ["\n", ";", "."],
    }
    assert by_byte(record, **options) == (
        "Q:a\nT: b;A: c.∎",
        "...........xxxx",
    )
    assert by_byte(record, **options, learn=["t", "a"]) == (
        "Q:a\nT: b;A: c.∎",
        "......xxx..xxxx",
    )
    assert by_byte(record, **options, learn=["a"], learn_prefix=True) == ("Q:a\nT: b;A: c.∎", ".........xxxxxx")
    assert by_byte(record, **options, learn=["q"]) == ("Q:a\nT: b;A: c.∎", "..xx...........")


def test_nothing_is_learnt_of_an_empty_answer():
    made = document({"prompt": "a", "completion": ""}, Source("x", "completion"), BYTES)
    assert targets(made) == 0 and made.mask.tolist() == [False, False]


def test_world_conversation():
    assert by_byte({"messages": TALK}, format="messages") == (
        "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello!\n\n∎",
        "." * len("System: Be brief.\n\nUser: Hi\n\nAssistant:") + "x" * len(" Hello!\n\n∎"),
    )
    assert by_word({"messages": TALK}, format="messages") == [
        "System", ":", " Be", " brief", ".", "\n\n", "User", ":", " Hi", "\n\n", "Ass", "istant", ":",
        "< Hello>", "<!>", "<\n\n>", "<∎>",
    ]  # fmt: skip


def test_sharegpt_of_two_turns():
    for template, roles in ((None, None), ("world", ["gpt"]), ("world", ["assistant"])):
        assert by_byte({"conversations": SHARE}, format="messages", template=template, learn=roles) == (
            "User: 1+1\n\nAssistant: 2\n\nUser: 2+2\n\nAssistant: 4\n\n∎",
            ".....................xxxx.....................xxxxx",
        )


def test_users_are_learnt_if_asked():
    assert by_byte({"m": TALK[1:]}, format="messages", column="m", learn=["user"]) == (
        "User: Hi\n\nAssistant: Hello!\n\n∎",
        "." * len("User:") + "x" * len(" Hi\n\n") + "." * len("Assistant: Hello!\n\n∎"),
    )
    assert by_byte({"m": TALK[1:]}, format="messages", column="m", learn=["assistant"], learn_prefix=True) == (
        "User: Hi\n\nAssistant: Hello!\n\n∎",
        "." * len("User: Hi\n\n") + "x" * len("Assistant: Hello!\n\n∎"),
    )


def test_chatml():
    assert by_byte({"messages": TALK[1:]}, format="messages", template="chatml") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n∎",
        "." * len("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n") + "x" * len("Hello!<|im_end|>\n∎"),
    )


def test_no_empty_line_is_left_in_a_turn_but_in_replies():
    said = [
        {"role": "user", "content": " a\r\n\r\nb "},
        {"role": "assistant", "content": "<think>c\n\nd</think>\n\ne\n"},
    ]
    text, _ = by_byte({"messages": said}, format="messages")
    assert text == "User: a\nb\n\nAssistant: <think>c\n\nd</think>\n\ne\n\n∎"


@pytest.mark.parametrize("tokenizer", [BYTES, WORLD])
def test_tokens_are_those_that_chat_reads(tokenizer):
    """It reads a question up to "Assistant:", and then the reply with the space before it and the empty line after."""
    reads = ["System: Be brief.\n\nUser: Hi\n\nAssistant:", " Hello!\n\n"]
    expected = np.concatenate([tokenizer.encode(text) for text in reads])
    made = document({"messages": TALK}, Source("x", "messages"), tokenizer)
    assert made.tokens.tolist() == [*expected.tolist(), tokenizer.end_of_document]


def test_text_is_cut_at_borders_of_the_mask_only():
    parts = [("ab", True), ("cd ", True), ("ef", False), ("gh", False)]
    made = encode(parts, WORLD)
    assert made.tokens.tolist() == [*WORLD.encode("abcd "), *WORLD.encode("efgh"), 0]
    whole = document(
        {"a": "inter", "b": "national"}, Source("x", "completion", columns=["a", "b"], learn=["a", "b"]), WORLD
    )
    assert whole.tokens.tolist() == [*WORLD.encode("international"), 0]


def test_content_in_parts():
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages([{"role": "user", "content": texts}])[0]["content"] == "ab"


CHAT = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip


def hub_tokenizer(folder, template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | ({"chat_template": template} if template else {})))
    return load_tokenizer(str(folder))


def test_a_tokenizers_own_template(tmp_path):
    tokenizer = hub_tokenizer(tmp_path, CHAT)
    made = document({"messages": TALK + TALK[1:2]}, Source("x", "messages", template="tokenizer"), tokenizer)
    pairs = shown(made, tokenizer)
    assert "".join(t for t, _ in pairs) == "[system]Be brief.∎[user]Hi∎[assistant]Hello!∎[user]Hi∎"
    assert "".join(t for t, m in pairs if m) == "Hello!∎"  # nothing is added behind its own last words
    asked = Source("x", "messages", template="tokenizer", learn_prefix=True)
    assert (
        "".join(t for t, m in shown(document({"messages": TALK}, asked, tokenizer), tokenizer) if m)
        == "[assistant]Hello!∎"
    )


@pytest.mark.parametrize(("template", "message"), [
    ("{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}", "message 3: the tokenizer's chat"),
    ("{{ raise_exception('no system') }}", "chat template refuses it: no system"),
    (None, "gives no chat template"),
])  # fmt: skip
def test_templates_that_cannot_be_used(tmp_path, template, message):
    tokenizer = hub_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match=message):
        document({"messages": TALK + TALK[1:]}, Source("x", "messages", template="tokenizer"), tokenizer)


def test_bytes_have_no_template():
    with pytest.raises(ValueError, match=r"tokenizer bytes has no chat template: use template world or chatml"):
        load_template("bytes")


def test_your_own_function(tmp_path, monkeypatch):
    (tmp_path / "ours_formats.py").write_text(
        "from infctx.segments import Document\n"
        "def plain(record):\n    return Document([1, 2, 3], [False, True, False])\n"
        "def named(record, tokenizer):\n    return Document(tokenizer.encode(record['x']))\n"
        "def bad(record):\n    return record['x']\n"
        "def none():\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    made = document({}, Source("x", "ours_formats:plain"), BYTES)
    assert (made.tokens.tolist(), made.mask.tolist()) == ([1, 2, 3], [False, True, False])
    assert document({"x": "ab"}, Source("x", "ours_formats:named"), BYTES).tokens.tolist() == [98, 99]
    assert b"def named" in load_function("ours_formats:named")[1] and sys.path == before
    for given, message in (
        ([1], r"must return a Document\(tokens, mask\), got list"),
        ((["a"], None), "tokens must be a list of ids"),
        (([1, 2], [True]), "2 tokens and 1 of the mask"),
        (([1, 257], None), "token id 257 is not of tokenizer bytes"),
        (([-1, 2], None), "token id -1 is not of"),
        (None, "ours_formats:bad fails: KeyError: 'x': mend the function or the record"),
    ):
        with pytest.raises(ValueError, match=message):
            document({} if given is None else {"x": given}, Source("x", "ours_formats:bad"), BYTES)
    for name, message in (("none", "it must take a record"), ("missing", "cannot be loaded: AttributeError")):
        with pytest.raises(ValueError, match=message):
            load_function(f"ours_formats:{name}")
    with pytest.raises(ValueError, match="nowhere_formats:x: cannot be loaded: ModuleNotFoundError"):
        load_function("nowhere_formats:x")


def test_binidx_tokens_are_as_they_are():
    made = document(np.array([5, 0, 256], np.int32), Source("x", "binidx"), BYTES)
    assert made.tokens.tolist() == [5, 0, 256] and made.mask is None


def test_pieces_of_a_long_document_hold_each_target_once():
    random = np.random.default_rng(0)
    for _ in range(300):
        size, most = int(random.integers(1, 60)), int(random.integers(2, 20))
        whole = Document(np.arange(size), random.random(size) < 0.4 if size % 3 else None)
        pieces = shorten(whole, Source("x", max_tokens=most, too_long="split"))
        learnt = np.ones(size, bool) if whole.mask is None else whole.mask
        found = [int(t) for p in pieces for t, m in zip(p.tokens[1:], (learnt[p.tokens])[1:]) if m]
        assert found == [t for t in range(1, size) if learnt[t]]  # a document's first token is no target
        assert sum(targets(p) for p in pieces) == targets(whole)
        assert all(len(p.tokens) <= most for p in pieces) and all(len(p.tokens) > 1 for p in pieces[1:])
        for a, b in zip(pieces, pieces[1:]):
            assert a.tokens[-1] == b.tokens[0]
        for p in pieces:
            assert (p.mask is None) == (whole.mask is None) and (p.mask is None or (p.mask == learnt[p.tokens]).all())


def test_long_documents_are_refused_or_dropped():
    whole = Document(np.arange(5))
    with pytest.raises(ValueError, match=r"5 tokens are more than data.source.max_tokens \(4\)"):
        shorten(whole, Source("x", max_tokens=4))
    assert shorten(whole, Source("x", max_tokens=4, too_long="drop")) == []
    assert shorten(whole, Source("x", max_tokens=5)) == [whole]


def said(role, content):
    return {"messages": [{"role": role, "content": content}]}


TALKS = {"format": "messages"}
NO_TEXT = "message 1: its content must be text, got"
BAD = [
    ({"prompt": "a"}, {"format": "completion"}, "no key 'completion'; found: 'prompt'"),
    ({"prompt": "a", "completion": 3}, {"format": "completion"}, "'completion' must be a string, got int"),
    (["a"], {"format": "instruction"}, "no key 'instruction'; found: list"),
    ({"x": 1}, TALKS, "no key 'messages'; found: 'x'"),
    ({"messages": "hi"}, TALKS, "a conversation must be a list of messages, got str"),
    ({"messages": []}, TALKS, "a conversation must be a list of messages, got []"),
    ({"messages": ["hi"]}, TALKS, "message 1 must have role and content, or from and value"),
    ({"messages": [{"role": "user"}]}, TALKS, "message 1 must have role and content"),
    (said("narrator", "x"), TALKS, "role 'narrator' is not known"),
    (said(["user"], "x"), TALKS, "role ['user'] is not known"),
    ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, TALKS, "message 4: template world has no role 'tool'"),
    (said("user", None), TALKS, f"{NO_TEXT} NoneType"),
    (said("user", [{"type": "image_url"}]), TALKS, f"{NO_TEXT} list"),
]


@pytest.mark.parametrize(("record", "options", "message"), BAD)
def test_bad_records(record, options, message):
    with pytest.raises(ValueError) as error:
        document(record, Source("x", **options), BYTES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parts_are_pure():
    source = Source("x", "completion")
    record = {"prompt": "a", "completion": "b"}
    assert columns(record, source) == columns(record, source) == [("a", False), ("", False), ("b", True)]
    assert part("P: ", "t", ".", True, False) == [("P:", False), (" t.", True)]
    assert part("P: ", "t", ".", False, False) == [("P: t.", False)]
    assert part("P: ", "t", ".", True, True) == [("P: t.", True)]
