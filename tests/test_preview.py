"""What `preview` shows is what the loader gives the model: token by token, mask by mask, border by border."""

import json
import re
import struct

import numpy as np
import pytest
from rich.text import Text
from test_huggingface import save
from tiny import make_project, run

from infctx.data import DocumentData
from infctx.documents import prepare
from infctx.huggingface import HuggingFaceTokenizer
from infctx.loader import WindowLoader
from infctx.preview import HEAD, TAIL, histogram, joined, stretches
from infctx.segments import Plan
from infctx.sources import Source
from infctx.tokenizer import ByteTokenizer, load_tokenizer
from infctx.tokentext import add_tokens, pieces

BYTES = ByteTokenizer()
CHARS = "naïve 日本語, 🐢🐢\n\tend \x1b[31m\u202e"


def plain(text, mask=None, borders=None, tokenizer=BYTES):
    ids = tokenizer.encode(text) if isinstance(text, str) else np.array(text)
    out = Text()
    learnt = np.zeros(len(ids), bool) if mask is None else np.array(mask, bool)
    add_tokens(out, ids, learnt, borders or {}, tokenizer, False)
    return out.plain


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Prompts and completions of many lengths."""
    folder = tmp_path_factory.mktemp("documents")
    random = np.random.default_rng(0)
    rows = [{"prompt": "é" * int(a), "completion": "日x" * int(b)} for a, b in random.integers(1, 40, (25, 2))]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return prepare(Source(str(folder / "in.jsonl"), "completion"), BYTES, folder / "out")


@pytest.mark.parametrize("segments", [1, 3, None])
def test_stretches_make_up_each_document(documents, segments):
    """By itself, and joined from its windows: ids, masks, and the borders that the plan says."""
    lanes, length = 2, 16
    plan = Plan(documents.inputs, lanes, length, segments, 1, 0)
    loader = WindowLoader(documents, lambda _: plan, range(lanes), 1, 0, {})
    parts = [[] for _ in documents.inputs]
    for window in loader:
        for lane in range(lanes):
            for stretch in stretches(window, lane, documents):
                parts[stretch.document].append(stretch)
    for number, n in enumerate(documents.inputs.tolist()):
        ((lane, at),) = [(i, int(np.flatnonzero(x == number)[0])) for i, x in enumerate(plan.documents) if number in x]
        place = int(plan.begins[lane][at])
        whole = joined(documents, plan, number, lane, place)
        for ids, learnt in ((whole.ids, whole.learnt), [np.concatenate([x[k] for x in parts[number]]) for k in (2, 3)]):
            assert ids.tolist() == documents.tokens(number, 0, n + 1).tolist()
            assert learnt.tolist() == [False, *documents.mask(number, 1, n + 1).tolist()]
        cuts = [x for x in range(1, n) if (place + x) % length == 0]
        assert sorted(whole.borders) == cuts
        assert all((whole.borders[x] == "window") == (place + x in plan.borders) for x in cuts)


def test_every_token_shows():
    assert plain("ab\tc\n\x1b[0m\u202e\\n 日\x00") == "ab→\tc↵\n\\x1b[0m\\u202e\\n 日\\x00"
    assert plain("é日x", [1, 1, 0, 0, 0, 0]) == "⟦é⟧日x"
    assert plain("é日x", [0, 1, 1, 1, 1, 0]) == "\\xc3⟦\\xa9日⟧x"  # a mask that cuts a character
    assert plain("日本", borders={1: "segment", 3: "window"}) == "\\xe6│\\x97\\xa5║本"
    assert plain([0, 98, 0, 99, 0xE6 + 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]) == "⟨end⟩⟦a⟨end⟩b\\xe6⟨end⟩⟧⟨end⟩"
    assert plain([0xE6 + 1, 0, 0x97 + 1, 0xA5 + 1]) == "\\xe6⟨end⟩\\x97\\xa5"  # an end inside a character


@pytest.mark.parametrize("name", ["bytes", "world", "byte_level", "metaspace"])
def test_pieces_are_the_text(name, tmp_path):
    tokenizer = load_tokenizer(name) if name in ("bytes", "world") else None
    if tokenizer is None:
        save(tmp_path / "tokenizer", name)
        tokenizer = HuggingFaceTokenizer(str(tmp_path / "tokenizer"))
    text = CHARS * 2 if name != "metaspace" else "Hello world, it's the end. Two spaces"
    ids = tokenizer.encode(text).tolist()
    end = tokenizer.end_of_document
    found = list(pieces([*ids, end, *ids, end, end], tokenizer, set()))
    assert "".join(x.text for x in found).replace("⟨end⟩ H", "⟨end⟩H") == f"{text}⟨end⟩{text}⟨end⟩⟨end⟩"
    assert [x.begin for x in found] == [0, *(x.end for x in found)][:-1] and found[-1].end == 2 * len(ids) + 3
    places = set(range(1, len(ids)))  # every token by itself: halves of characters by their bytes, or as ids
    found = list(pieces(ids, tokenizer, places))
    assert [(x.begin, x.end) for x in found] == [(i, i + 1) for i in range(len(ids))]
    assert all(x.text and "\ufffd" not in x.text for x in found)


# what a source holds -> the lines that it is shown as
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
FORMATS = {
    "text": ("hé", "h⟦é⟨end⟩⟧"),
    "jsonl": ({"text": "a\nb"}, "a⟦↵\nb⟨end⟩⟧"),
    "completion": ({"prompt": "so: ", "completion": "é"}, "so: ⟦é⟨end⟩⟧"),
    "instruction": (
        {"instruction": "do", "input": "", "output": "it"},
        "Instruction: do↵\n↵\nResponse:⟦ it⟨end⟩⟧",
    ),
    "messages": (CHAT, "User: hi↵\n↵\nAssistant:⟦ yo↵\n↵\n⟨end⟩⟧"),
    "binidx": ([98, 0, 0xE6 + 1, 99], "a⟦⟨end⟩\\xe6b⟧"),
    "mine:make": ({"text": "abc"}, "ab⟦c⟧"),
}


def write(folder, kind, content):
    """A file of a format; returns its path."""
    if kind == "binidx":
        (folder / "in.bin").write_bytes(np.array(content, np.uint16).tobytes())
        head = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 1, 2)
        index = np.array([len(content)], np.int32).tobytes() + np.array([0], np.int64).tobytes()
        (folder / "in.idx").write_bytes(head + index + np.array([0, 1], np.int64).tobytes())
        return "in"
    name = "in.txt" if kind == "text" else "in.jsonl"
    (folder / name).write_text(content if kind == "text" else json.dumps(content))
    return name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def preview(monkeypatch, capsys, *options, code=None):
    """What it prints; its error, if it is to end with such a code."""
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "preview", "-c", "recipe.yaml", *options)
    assert (end.value.code or None) == code
    return capsys.readouterr().out if code is None else capsys.readouterr().err


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format(folder, monkeypatch, capsys, kind):
    content, shown = FORMATS[kind]
    (folder / "mine.py").write_text(
        "import numpy as np\nfrom infctx.segments import Document\n"
        "def make(record, tokenizer):\n    ids = tokenizer.encode(record['text'])\n"
        "    return Document(ids, np.arange(len(ids)) > 1)\n"
    )
    source = json.dumps({"path": write(folder, kind, content), "format": kind})
    out = preview(monkeypatch, capsys, "--data.source", source, "--data.segment_length", "64")
    (body,) = re.findall(r"\ndocument 0, .*?\n(.*?)\n\nprepared:", out, re.S)
    assert body == shown and "\x1b" not in out


def test_windows_and_whole_documents(folder, monkeypatch, capsys):
    out = preview(monkeypatch, capsys, "--documents", "3")
    assert out.count("\ndocument ") == 3 and re.search(r"║ window 0 of \d+ in epoch 0: 2 lanes, 3 segments of 16", out)
    assert "tokens 0 to 47 of 231 tokens, 47 learnt here, lane" in out and "goes on in the next window" in out
    text = (folder / "texts" / "2.txt").read_text()
    out = preview(monkeypatch, capsys, "--first", "2", "--documents", "1")
    assert "document 2, texts/*.txt: 231 tokens, 230 learnt here, lane" in out and out.count("\ndocument ") == 1
    body = re.sub("[⟦⟧│║↵]|⟨end⟩", "", out.split("epoch 0\n")[1].split("\n\nprepared:")[0])
    assert body == text
    assert "document" not in preview(monkeypatch, capsys, "--documents", "0").split("prepared:")[0].split("\n\n")[-1]


def test_summary_and_page(folder, monkeypatch, capsys):
    rows = [{"prompt": "<b>" * i, "completion": "c" * i} for i in range(6)]  # the first is empty
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "p", "completion": "x" * 1000}])))
    chats = {"path": "in.jsonl", "format": "completion", "name": "pairs", "weight": 0.5, "min_tokens": 6,
             "max_tokens": 400, "too_long": "split"}  # fmt: skip
    sources = json.dumps([{"path": "texts/*.txt", "format": "text"}, chats])
    given = ("--data.source", sources, "--html", "out/page.html", "--model.horizon", "1")
    out = preview(monkeypatch, capsys, *given, "--first", "6", "--documents", "9")
    assert "left out, without a target: 1; left out, shorter than min_tokens: 1; 1 were split into 3" in out
    found = re.search(r"pairs: 3 documents \(weight 0.5\), (\d+) targets, (\d+) learnt \(([\d.]+)%\), ([\d.]+)%", out)
    assert f"{100 * int(found[2]) / int(found[1]):.1f}" == found[3]
    data = DocumentData([Source("texts/*.txt"), Source("in.jsonl", "completion", min_tokens=6, max_tokens=400,
                                                       too_long="split", weight=0.5)], "prepared")  # fmt: skip
    data.setup("fit")
    mine = data.rows(0)[data.rows(0) >= 6]
    assert int(found[1]) == data.train.inputs[mine].sum() and int(found[2]) == data.train.supervised[mine].sum()
    assert re.search(r"padding \d+\.\d+%; tokens whose gradient is cut before their document begins: \d+\.\d+%", out)
    assert "not read in epoch 0" in out  # half of the pairs
    page = (folder / "out" / "page.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and "http" not in page and "⟦learnt" not in page
    assert re.search(r'<span class="r\d+">[^<]*ccc', page)


def test_the_middle_of_a_long_document(folder, monkeypatch, capsys):
    (folder / "texts" / "9.txt").write_text("0123456789" * 500)
    out = preview(monkeypatch, capsys, "--first", "6", "--documents", "1", "--data.segments_per_window", "document")
    gone = 5001 - HEAD - TAIL
    assert re.search(
        rf"\n\.\.\. {gone:,} tokens not shown, {gone:,} of them learnt, 27\d borders of segments \.\.\.\n", out
    )


def test_histogram():
    assert histogram(np.array([1, 2, 3, 3, 4, 7, 8, 1023, 1024])) == [
        "    1 to     1 1 ████████",
        "    2 to     3 3 ████████████████████████",
        "    4 to     7 2 ████████████████",
        "    8 to    15 1 ████████",
        *(f"{2**i:>5} to {2 ** (i + 1) - 1:>5} 0" for i in range(4, 9)),
        "  512 to 1,023 1 ████████",
        "1,024 to 2,047 1 ████████",
    ]


def test_errors(folder, monkeypatch, capsys):
    for options, message in {
        ("--documents", "-1"): "--documents must be at least 0, got -1",
        ("--first", "6"): "--first 6: there is no such document; they are 0 to 5",
        ("--first", "-1"): "--first -1: there is no such document",
        ("--model.horizon", "0"): "model.horizon must be at least 1",
        ("--data.source.path", "none/*.txt"): "no such file",
        ("--trainer.limit_train_batches", "0.01"): "leaves no window",
        ("--html", "texts"): "texts",
    }.items():
        error = preview(monkeypatch, capsys, *options, code=2)
        assert message in error and len(error.splitlines()) == 1
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "preview")
    assert end.value.code == 2 and "give a recipe: infctx preview -c recipe.yaml" in capsys.readouterr().err
