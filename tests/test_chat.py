"""The state of a conversation is that of its transcript, as one would write it."""

import io
import json
import sys

import pytest
import torch
from tiny import ARCHS, run, tiny_model, worst

import infctx
from infctx.chat import Conversation, clean, split_thought
from infctx.generate import read
from infctx.ops.backends import _automatic
from infctx.sampling import Sampling
from infctx.state import pack
from infctx.statefile import save_state
from infctx.tokenizer import ByteTokenizer, WorldTokenizer

WORDS = ByteTokenizer()
GREEDY = Sampling(12, temperature=0.0)
TOOLS = [{"name": "weather", "description": "of a plaçe", "arguments": {"place": {"type": "string"}}}]


def model(arch="rwkv7", **sizes):
    return tiny_model(arch, vocab_size=257, **sizes)


def scripted(monkeypatch, *replies, tokenizer=WORDS):
    """Whatever the model says, reply r is the tokens of replies[r], then the end of the document."""
    made = [[*tokenizer.encode(reply).tolist(), tokenizer.end_of_document] for reply in replies]

    def script(scores, sampling, generators):
        return torch.tensor([made[sampling.seed].pop(0)])  # turn t draws by seed + t

    monkeypatch.setattr(sys.modules["infctx.generate"], "choose", script)


def has_read(conversation, transcript):
    state = read(conversation.model, [conversation.tokenizer.encode(transcript)])[1]
    assert worst([pack(conversation.state)], [pack(state)]) < 1e-9
    if state.memory is not None:
        assert worst(conversation.state.memory[:3], state.memory[:3]) < 1e-9


@pytest.mark.parametrize("arch", ARCHS)
def test_what_a_model_says_is_read_as_it_was_given_out(arch):
    conversation, transcript = Conversation(model(arch), WORDS, Sampling(15), "Be\n\n\nkind. "), "System: Be\nkind.\n\n"
    has_read(conversation, transcript)
    for question, read_as in {"Who are you?": "Who are you?", " one\r\n\r\n\n\ntwo\n": "one\ntwo"}.items():
        pieces = list(conversation.ask(question))
        assert all(pieces) and "".join(pieces).strip() == conversation.reply
        reply = f"Assistant: {conversation.reply}".rstrip()
        transcript += f"User: {read_as}\n\n{reply}\n\n"
        has_read(conversation, transcript)
    assert conversation.turns == 2
    conversation.reset()
    has_read(conversation, "System: Be\nkind.\n\n")
    assert conversation.turns == 0


@pytest.mark.parametrize(
    ("drawn", "reply"),
    [
        (" Hello.\n\nUser: and", "Hello."),
        ("Hello \n\n\n\nSystem: and", "Hello"),
        (" one\n\ntwo\n\nAssistant: and", "one\n\ntwo"),
        ("\n\nUser", "User"),
        ("\n\nUser:", ""),
        (" a\n\nUs", "a\n\nUs"),
        ("", ""),
        (" 漢字 ", "漢字"),
        (" stop ###", "stop"),
    ],
)
def test_replies_end_at_the_next_speaker(monkeypatch, drawn, reply):
    scripted(monkeypatch, drawn)
    conversation = Conversation(model(), WORDS, Sampling(100, stop="###"))
    pieces = list(conversation.ask("hi"))
    assert conversation.reply == "".join(pieces).strip() == reply
    assert not any("User:" in piece or "#" in piece for piece in pieces)
    has_read(conversation, f"User: hi\n\nAssistant: {reply}".rstrip() + "\n\n")


def test_thoughts(monkeypatch):
    scripted(monkeypatch, ">One.\n\nTwo.</think>\nThree.\n\nUser:", ">and so on")
    conversation = Conversation(model(), WORDS, Sampling(100), think=True)
    reply = "<think>One.\n\nTwo.</think>\nThree."
    assert "".join(conversation.ask("hi")) == conversation.reply == reply
    assert split_thought(reply) == ("One.\n\nTwo.", "Three.")
    has_read(conversation, f"User: hi\n\nAssistant: {reply}\n\n")
    assert "".join(conversation.ask("more")) == "<think>and so on"
    assert split_thought(conversation.reply) == ("and so on", "")
    assert split_thought("plain") == ("", "plain")


def test_tools(monkeypatch, tmp_path):
    scripted(monkeypatch, '\n{"name": "weather"}\n```\n\nUser: ', "\n{}")
    conversation = Conversation(model(), WORDS, Sampling(100), "Short.", tools=TOOLS)
    heading = f"System: Short.\nTools:\n{json.dumps(TOOLS, ensure_ascii=False)}\nReturn only a JSON function call.\n\n"
    has_read(conversation, heading)
    reply = '```json\n{"name": "weather"}\n```'
    pieces = list(conversation.ask("now"))
    assert pieces[0] == "```json" and "".join(pieces) == conversation.reply == reply
    has_read(conversation, f"{heading}User: now\n\nAssistant: {reply}\n\n")
    conversation.save(tmp_path / "a.safetensors")
    again = Conversation.load(tmp_path / "a.safetensors", conversation.model, WORDS, Sampling(100))
    assert "".join(again.ask("Function output: 20 C")) == "```json\n{}"


@pytest.mark.parametrize("options", [{}, {"think": True}, {"tools": TOOLS}], ids=["plain", "think", "tools"])
def test_turns_in_world_tokens_are_those_of_the_whole_transcript(monkeypatch, options):
    world = WorldTokenizer(fast=False)
    scripted(monkeypatch, " Hm.\n\n 1 > 0: ok \n\n\nUser: and", "\n>Yes.\n\n", tokenizer=world)
    conversation = Conversation(tiny_model(vocab_size=65536), world, Sampling(50), "Be\nkind.", **options)
    transcript = "System: Be\nkind.\n\n"
    if options.get("tools"):
        told = json.dumps(TOOLS, ensure_ascii=False)
        transcript = f"System: Be\nkind.\nTools:\n{told}\nReturn only a JSON function call.\n\n"
    for question in ("Is it 漢字?", "Sure"):
        list(conversation.ask(question))
        transcript += f"User: {question}\n\nAssistant: {conversation.reply}\n\n"
        has_read(conversation, transcript)


def test_a_reply_that_is_closed_early_is_remembered_as_far_as_it_went(monkeypatch):
    scripted(monkeypatch, " one two three")
    conversation = Conversation(model(), WORDS, Sampling(100))
    pieces = conversation.ask("hi")
    assert "".join(next(pieces) for _ in range(5)) == "one t"
    pieces.close()
    has_read(conversation, "User: hi\n\nAssistant: one t\n\n")
    assert conversation.turns == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_saved_and_loaded_equals_going_on(arch, tmp_path):
    net, sampling, file = model(arch), Sampling(20, seed=4), tmp_path / "a.safetensors"
    conversation = Conversation(net, WORDS, sampling, "Be kind.")
    list(conversation.ask("one"))
    conversation.save(file)
    again = Conversation.load(file, net, WORDS, sampling)
    assert again.turns == 1
    assert list(conversation.ask("two")) == list(again.ask("two"))
    again.reset()
    assert again.turns == 1 and list(again.ask("two")) and again.reply == conversation.reply
    with pytest.raises(ValueError, match="leave them out"):
        Conversation.load(file, net, WORDS, sampling, system="Be rude.")


def test_any_state_may_go_before(tmp_path):
    net = model()
    state = read(net, [WORDS.encode("before")])[1]
    save_state(state, tmp_path / "a.safetensors")
    conversation = Conversation.load(tmp_path / "a.safetensors", net, WORDS, GREEDY, "Be kind.")
    has_read(conversation, "beforeSystem: Be kind.\n\n")
    assert list(conversation.ask("hi")) == list(Conversation(net, WORDS, GREEDY, "Be kind.", state=state).ask("hi"))


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="think and tools"):
        Conversation(model(), WORDS, GREEDY, think=True, tools=TOOLS)
    with pytest.raises(ValueError, match="has 257 ids, the model only 50"):
        Conversation(tiny_model(), WORDS, GREEDY, "Be kind.")
    with pytest.raises(ValueError, match="must not be empty"):
        list(Conversation(model(), WORDS, GREEDY).ask("\n \n"))
    assert clean("a\r\n\r\nb\n\n\nc \n") == "a\nb\nc"


@pytest.fixture
def chat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    infctx.save_model(model(dtype=torch.float32), "model.pth")

    def talk(typed, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        run(monkeypatch, "chat", "model.pth", "--tokenizer", "bytes", *argv)
        return capsys.readouterr().out

    return talk


def test_a_line_in_another_encoding_is_told_and_left_out(chat, monkeypatch, tmp_path, capsys):
    scripted(monkeypatch, " One.", " Two.")
    typed = io.TextIOWrapper(io.BytesIO(b"a\nna\xefve\n" + "ç\n".encode()), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    run(monkeypatch, "chat", "model.pth", "--tokenizer", "bytes", "--save_state", "talk.safetensors")
    said = capsys.readouterr().out
    assert said == "Assistant: One.\n\nnot read: the line is not utf-8 text\nAssistant: Two.\n\n"
    loaded = Conversation.load("talk.safetensors", infctx.load_model("model.pth"), WORDS, GREEDY)
    assert loaded.turns == 2
    state = read(loaded.model, [WORDS.encode("User: a\n\nAssistant: One.\n\nUser: ç\n\nAssistant: Two.\n\n")])[1]
    assert worst([pack(loaded.state)], [pack(state)]) < 1e-5


def test_commands_are_listed_and_others_are_not_said_to_the_model(chat, monkeypatch, caplog):
    _automatic.cache_clear()  # as in a new process
    monkeypatch.setattr(Conversation, "ask", lambda *_: [str(any("wkv kernel" in x for x in caplog.messages))])
    caplog.set_level("INFO", "infctx")
    said = chat("/help\n/rest\n/restore now\n/ \n/etc/passwd is a file\n")
    listed, _, rest = said.partition("/rest: ")
    assert [line.split()[0] for line in listed.splitlines()] == ["/reset", "/save", "/quit", "/help"]
    assert rest.splitlines()[0] == "there is no such command; there are: /reset, /save FILE, /quit, /help"
    assert "/restore: there is no" in rest and "/: there is no" in rest
    assert rest.count("Assistant: True\n") == rest.count("Assistant") == 1  # kernels were told of before


def test_command(chat, monkeypatch):
    scripted(monkeypatch, " One.\n\nUser:", " Two.")
    assert chat("a\n\nb\n") == "Assistant: One.\n\nAssistant: Two.\n\n"
    scripted(monkeypatch, " One.", " Two.")
    assert chat("a\n/quit\nb\n") == "Assistant: One.\n\n"
    scripted(monkeypatch, ">1</think>2", ">3</think>4")
    assert chat("a\n", "--think", "--system", "Be kind.") == "Assistant: <think>1</think>2\n\n"


def test_command_reset_and_save(chat):
    options = ("--max_tokens", "9", "--temperature", "0.5", "--seed", "3", "--dtype", "float32", "--device", "cpu")
    first, second = chat("a\nb\n", *options).split("\n\nAssistant: ")[:2]
    assert chat("a\n/reset\na\n", *options).startswith(f"{first}\n\n{first}")
    out = chat("a\n/save half.safetensors\n/save name\nb\n", *options)
    assert "state: half.safetensors\nnot saved: name" in out and out.endswith(f"Assistant: {second}")
    assert chat("b\n", "--state", "half.safetensors", *options) == f"Assistant: {second}"
    chat("a\n", "--save_state", "end.safetensors", *options)
    assert chat("b\n", "--state", "end.safetensors", *options) == f"Assistant: {second}"


def test_command_with_tools(chat, monkeypatch, tmp_path):
    scripted(monkeypatch, "\n{}")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    assert chat("a\n", "--tools", "tools.json") == "Assistant: ```json\n{}\n\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--think", "--tools", "tools.json"], "think and tools"),
        (["--tools", "nowhere.json"], "nowhere.json"),
        (["--tools", "object.json"], "object.json: tools are a JSON list"),
        (["--tools", "model.pth"], "model.pth: not UTF-8"),
        (["--tools", "text.json"], "text.json: not JSON"),
        (["--state", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--top_p", "0"], "top_p must be in (0, 1]"),
        (["--save_state", "a.pth"], "a.pth: a conversation is kept as .safetensors"),
    ],
)
def test_command_refuses(chat, capsys, tmp_path, options, message):
    for name, content in {"tools": TOOLS, "object": {"name": "a"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "text.json").write_text("[a")
    with pytest.raises(SystemExit):
        chat("a\n", *options)
    output = capsys.readouterr()
    assert message in output.err and not output.out and len(output.err.splitlines()) <= 5
