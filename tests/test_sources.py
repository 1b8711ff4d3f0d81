"""Several sources: how often each is read, how much of it is kept, and what is said of the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from tiny import RECIPE, make_project, run

from infctx.data import DocumentData
from infctx.documents import prepare
from infctx.formats import load_function
from infctx.segments import Plan
from infctx.sources import Source, as_sources, chosen, listed
from infctx.tokenizer import ByteTokenizer


def lines(file, texts):
    file.write_text("\n".join(json.dumps({"text": x}) for x in texts))
    return str(file)


def texts(documents):
    read = (documents.tokens(i, 0, int(n)) for i, n in enumerate(documents.inputs))
    return [bytes((x - 1).astype(np.uint8)).decode() for x in read]


def test_a_document_knows_its_source(tmp_path):
    one, two = lines(tmp_path / "one", ["a", "bb", ""]), lines(tmp_path / "two", ["c"])
    given = [Source(one, "jsonl", name="first"), Source(two, "jsonl")]
    documents = prepare(given, ByteTokenizer(), tmp_path / "out")
    assert (texts(documents), documents.source.tolist()) == (["a", "bb", "c"], [0, 0, 1])
    assert documents.names == ["first", two]
    some = documents.subset(np.array([2, 0]))
    assert (texts(some), some.source.tolist(), some.names) == (["c", "a"], [1, 0], ["first", two])


def test_names_and_weights_are_no_reason_to_prepare_again(tmp_path, capsys):
    path = lines(tmp_path / "one", ["a"])
    prepare(Source(path, "jsonl", name="x", weight=2), ByteTokenizer(), tmp_path / "out")
    again = prepare(Source(path, "jsonl", name="y"), ByteTokenizer(), tmp_path / "out")
    assert again.names == ["y"] and "up to date" in capsys.readouterr().out
    prepare(Source(path, "jsonl", limit=1), ByteTokenizer(), tmp_path / "out")
    assert "stale" in capsys.readouterr().out


def test_limits_count_documents_that_are_kept(tmp_path):
    path = lines(tmp_path / "one", ["", "a", "bcdef", "gg", "h"])
    kept = prepare(Source(path, "jsonl", limit=2), ByteTokenizer(), tmp_path / "out")
    assert texts(kept) == ["a", "bcdef"]
    source = Source(path, "jsonl", limit=2, max_tokens=4, too_long="split")
    assert texts(prepare(source, ByteTokenizer(), tmp_path / "out")) == ["a", "bcd", "ef"]


def test_what_is_left_out_is_said(tmp_path, capsys):
    path = lines(tmp_path / "one", ["", "a", "bb", "c" * 9, "d" * 9])
    source = Source(path, "jsonl", name="mine", min_tokens=3, max_tokens=5, too_long="split")
    prepare(source, ByteTokenizer(), tmp_path / "out")
    expected = ("data: mine: 7 documents, 27 tokens (20 supervised); left out, without a target: 1; left out, "
                "shorter than min_tokens: 1; 2 were split into 6")  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == expected
    prepare(source, ByteTokenizer(), tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1] == expected  # also when nothing is to be done
    dropped = Source(path, "jsonl", name="mine", max_tokens=5, too_long="drop")
    prepare(dropped, ByteTokenizer(), tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1].endswith("a target: 1; left out, longer than max_tokens: 2")


def test_pieces_without_a_target_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p" * 20, "completion": "ab"}))
    source = Source(str(tmp_path / "a.jsonl"), "completion", max_tokens=6, too_long="split")
    documents = prepare(source, ByteTokenizer(), tmp_path / "out")
    assert documents.supervised.tolist() == [1, 2]
    assert "left out, pieces of split ones without a target: 3; 1 were split into 2" in capsys.readouterr().out


def test_backslash_n_is_warned_of(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}))
    source = Source(str(tmp_path / "a.jsonl"), "completion", suffix=["\n", "\\n"])
    prepare(source, ByteTokenizer(), tmp_path / "out")
    assert "holds a backslash and an n, which is no new line: in YAML write" in caplog.text
    assert len(caplog.records) == 1


def test_a_function_is_part_of_the_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    lines(tmp_path / "a.jsonl", ["ab"])
    found = []
    for first in (7, 7, 8):
        (tmp_path / "ours_sources.py").write_text(
            "from infctx.segments import Document\n"
            f"def f(record):\n    assert record == {{'text': 'ab'}}\n    return Document([{first}, 2])\n"
        )
        sys.modules.pop("ours_sources", None)  # as in a new process
        load_function.cache_clear()
        made = prepare(Source("a.jsonl", "ours_sources:f"), ByteTokenizer(), "out")
        found.append((made.tokens(0, 0, 2).tolist(), made.digest))
    assert [tokens for tokens, _ in found] == [[7, 2], [7, 2], [8, 2]]
    assert found[0] == found[1] and found[1][1] != found[2][1]


def test_weights_of_whole_numbers_and_of_one():
    source = np.array([0, 1, 0, 1, 1])
    assert chosen(source, [1, 1.0], 3) is None
    for epoch in range(5):
        counts = np.bincount(chosen(source, [2, 1], epoch), minlength=5)
        assert counts.tolist() == [2, 1, 2, 1, 1]


@pytest.mark.parametrize("weight", [0.5, 0.1, 0.3, 1.7, 2.5])
def test_over_the_epochs_every_document_is_read_equally_often(weight):
    source = np.repeat([0, 1], [37, 5])
    total = np.zeros(42, int)
    for epoch in range(20):
        rows = chosen(source, [weight, 1], epoch)
        assert rows.tolist() == chosen(source, [weight, 1], epoch).tolist()
        assert abs((rows < 37).sum() - weight * 37) <= 1
        total += np.bincount(rows, minlength=42)
        assert np.ptp(total[:37]) <= 1 and (total[37:] == epoch + 1).all()
    assert (total[:37] >= int(20 * weight)).all()
    halves = [set(chosen(np.zeros(10, int), [0.5], epoch).tolist()) for epoch in range(3)]
    assert not halves[0] & halves[1] and halves[0] == halves[2]


def test_weights_that_leave_nothing():
    with pytest.raises(ValueError, match="leave epoch 0 without documents"):
        chosen(np.zeros(3, int), [0.1], 0)


@pytest.mark.parametrize("segments", [None, 3])
def test_a_plan_reads_what_was_chosen(segments):
    random = np.random.default_rng(0)
    inputs, rows = random.integers(1, 300, 40), random.integers(0, 40, 70)
    plan = Plan(inputs, 3, 16, segments, 5, 1, rows)
    read = np.zeros(40, int)
    for window in range(len(plan)):
        for piece in plan.pieces(window):
            read[piece.document] += piece.end - piece.begin
    assert (read == np.bincount(rows, minlength=40) * inputs).all()
    assert plan.tokens == inputs[rows].sum() and 0 <= plan.padding < 1 and 0 <= plan.cut(1) <= 1
    same = Plan(inputs, 3, 16, segments, 5, 1, np.arange(40))
    assert [list(same.pieces(i)) for i in range(len(same))] == [
        list(p) for p in (Plan(inputs, 3, 16, segments, 5, 1).pieces(i) for i in range(len(same)))
    ]


def test_a_list_that_grew_is_prepared_first(tmp_path):
    one, two = (Source(lines(tmp_path / name, ["abc"]), "jsonl") for name in ("one", "two"))
    DocumentData(one, str(tmp_path / "out")).prepare_data()
    with pytest.raises(ValueError, match=r"documents of 1 sources, data\.source names 2: run `infctx prepare` again"):
        DocumentData([one, two], str(tmp_path / "out")).setup("fit")


BAD = [
    ({"path": "hf:a/b", "format": "binidx"}, "data.source.format binidx is for pairs of files"),
    ({"format": "xml"}, "data.source.format 'xml' is not known; choose one of: text, jsonl, completion"),
    ({"format": "a:b:c"}, "data.source.format 'a:b:c' is not known"),
    ({"template": "world"}, "data.source.template means nothing to format text: leave it out"),
    ({"format": "messages", "prefix": ["a"]}, "data.source.prefix means nothing to format messages"),
    ({"format": "a:b", "column": "x"}, "data.source.column means nothing to format a:b"),
    ({"weight": 0}, "data.source.weight must be more than 0, got 0"),
    ({"weight": float("nan")}, "data.source.weight must be more than 0, got nan"),
    ({"limit": 0}, "data.source.limit must be at least 1, got 0"),
    ({"max_tokens": 1}, "data.source.max_tokens must be at least 2, got 1"),
    ({"too_long": "drop"}, "data.source.too_long is drop: set data.source.max_tokens"),
    ({"min_tokens": 9, "max_tokens": 5}, "data.source.min_tokens (9) is more than max_tokens (5)"),
    ({"subset": "x"}, "data.source.subset is for data sets by name"),
    ({"format": "instruction", "prefix": ["a"]}, "data.source.prefix must hold one text for each of: instruction"),
    ({"format": "instruction", "columns": ["a"]}, "data.source.columns: format instruction has 3, got 1: give 3, or"),
    ({"format": "completion", "columns": ["a"]}, "data.source.columns: format completion has 2, got 1: give 2"),
    ({"format": "completion", "columns": ["a", "a"]}, "data.source.columns: a column is named twice"),
    ({"format": "completion", "learn": ["x"]}, "data.source.learn: 'x' is no column; choose among: prompt, completion"),
    ({"format": "messages", "learn": ["x"]}, "data.source.learn: 'x' is no role that can be learnt"),
    ({"format": "messages", "template": "tokenizer", "learn": ["user"]}, "choose among: assistant"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings(options, message):
    with pytest.raises(ValueError) as error:
        Source(**{"path": "x"} | options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_lists(tmp_path):
    with pytest.raises(ValueError, match="an empty list"):
        listed([])
    with pytest.raises(ValueError, match="2 sources are called 'x': give each its own"):
        listed([Source("x"), Source("x")])
    with pytest.raises(ValueError, match=r"data\.validation\.weight"):
        DocumentData(Source("x"), "y", validation=Source("z", weight=2))
    assert as_sources([{"path": "x"}, {"path": "y", "weight": 2}]) == [Source("x"), Source("y", weight=2)]
    assert (as_sources({"path": "x"}), as_sources(0.5)) == (Source("x"), 0.5)


@pytest.mark.parametrize(("source", "message"), [
    ("{path: a, tempalte: world}", "data.source: there is no key 'tempalte'"),
    ("[{path: a}, {path: b, wieght: 2}]", "data.source: there is no key 'wieght'"),
    ("{path: a, weight: x}", "data.source.weight: expected float; got x"),
    ("{path: a, format: messages, template: alpaca}",
     "data.source.template: expected 'world', 'chatml' or 'tokenizer'; got alpaca"),
    ("{path: a, weight: -1}", "data.source.weight must be more than 0, got -1.0"),
])  # fmt: skip
def test_slips_in_a_source_are_told_in_a_line(tmp_path, monkeypatch, capsys, source, message):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{path: texts/*.txt, format: text}", source))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "prepare", "-c", str(tmp_path / "recipe.yaml"))
    said = capsys.readouterr().err
    assert f"infctx: error: {message}" in said and len(said.splitlines()) == 1


def test_a_recipe_with_several_sources(tmp_path, monkeypatch, capfd):
    """Fit, resume and plan by a list of sources; another weight is another order."""
    monkeypatch.chdir(make_project(tmp_path / "project"))
    Path("talk.jsonl").write_text("\n".join(
        json.dumps({"messages": [{"role": "user", "content": "?" * i}, {"role": "assistant", "content": "!" * 20}]})
        for i in range(1, 12)))  # fmt: skip
    head, _, tail = RECIPE.partition("  source:")
    talk = "{path: talk.jsonl, format: messages, template: chatml, weight: 0.5, name: talk}"
    own = tail.partition("\n")[0].strip()
    own = own.replace("}", ", weight: 2}")
    Path("two.yaml").write_text(f"{head}  source: [{own}, {talk}]\n{tail.partition(chr(10))[2]}")
    run(monkeypatch, "fit", "-c", "two.yaml", "--name", "a", "--trainer.max_epochs", "2")
    said = capfd.readouterr().out
    assert "data: talk: 11 documents" in said
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "plan", "-c", "two.yaml", "--ranks", "1")
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "-c", "two.yaml", "--name", "b", "--trainer.max_epochs", "3", "--resume",
            "runs/a/checkpoints/step-2",
            "--data.source", f"[{own}, {talk.replace('0.5', '1.5')}]")  # fmt: skip
    assert "data.source.weight was [2.0, 0.5] in the checkpoint and is [2.0, 1.5] now" in capfd.readouterr().err


MEASURE = """
import re, sys, threading, time
from pathlib import Path
from infctx import documents
from infctx.documents import Source, prepare
from infctx.tokenizer import ByteTokenizer
documents.FLUSH = 1 << 18
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
        time.sleep(0.003)
threading.Thread(target=watch, daemon=True).start()
for size in ("small", "large"):
    for file in sorted(Path(sys.argv[1], size).iterdir()):
        prepare(Source(str(file), "completion"), ByteTokenizer(), file.with_suffix(".out"))
        print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process holds is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """The most kilobytes held, without files that are mapped, at 3 and then at 60 MB of each kind: no more by 16 MB."""
    for size, records in (("small", 3_000), ("large", 60_000)):
        (tmp_path / size).mkdir()
        answers = [f"{i}".zfill(1000) for i in range(records)]
        table = pa.table({"prompt": [f"question {i}" for i in range(records)], "completion": answers})
        rows = list(map(json.dumps, table.to_pylist()))
        (tmp_path / size / "a.jsonl").write_text("\n".join(rows))
        (tmp_path / size / "b.json").write_text(f"[{','.join(rows)}]")
        csv.write_csv(table, tmp_path / size / "c.csv")
        parquet.write_table(table, tmp_path / size / "d.parquet", row_group_size=1 << 30)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    pool = {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # Arrow's own gives memory back later
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | pool)
    peaks = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    print(peaks)
    assert len(peaks) == 8 and peaks[-1] - peaks[3] < 16_000, peaks


@pytest.mark.parametrize("source", ["texts", "texts/**"])
@pytest.mark.parametrize("path", ["texts", "texts/prepared"])
def test_prepared_documents_among_the_texts_are_no_texts(tmp_path, monkeypatch, capsys, source, path):
    monkeypatch.chdir(make_project(tmp_path / "project", (40, 30)))
    for said in ("data: prepared", "is up to date"):
        with pytest.raises(SystemExit, match="0"):
            run(monkeypatch, "prepare", "-c", "recipe.yaml", "--data.source.path", source, "--data.path", path)
        out = capsys.readouterr().out
        assert said in out and "2 documents" in out
