"""The page of a run stands alone, on a phone and in the dark, and shows what the run's folder holds."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHS, make_project, random_state, run, tiny_model

from infctx.curves import POINTS, mean, some, thinned
from infctx.report import write_report
from infctx.run import border_norms
from infctx.snapshots import _pieces, state_norms
from infctx.task import DISTANCES
from infctx.tokenizer import ByteTokenizer
from infctx.weights import load_model

SECTIONS = ["Figures", "Loss", "Gradient", "States", "Memory and speed", "Learning rate", "Samples",
            "What was trained", "Recipe"]  # fmt: skip
VOID = {"meta", "link", "br"}


def line(step):
    """As version 0.4 wrote it."""
    return {
        "step": step, "tokens": 100 * step, "documents": 1, "loss": 5.0 / step, "lr": 1e-3, "grad_norm": 1.0,
        "tokens_per_second": 1000.0 + step, "peak_memory_bytes": 5e8, "seconds": 0.1 * step,
        "position_loss": [[0, 5.0, 1], [3, 16.0, 8]],
    }  # fmt: skip


def full(step):
    """With all that a line may have."""
    rates = [["matrices", 1e-3], ["rest", 1e-3], ["double", 2e-3]]
    sources = [["books/*.txt", 50.0 / step, 20], ["a name <of> many letters: " + "x" * 90, 4.0, 2], ["none", 0.0, 0]]
    far = [[1, 0.5 / step], [2, 0.25], [4, 1e-9]]
    return line(step) | {"group_lr": rates, "source_loss": sources, "border_gradient": far}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder, rows, **extra):
    folder.mkdir(exist_ok=True)
    write(folder / "metrics.jsonl", rows)
    for name, text in extra.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def everything(folder, steps=40):
    """A run with all that a page may show, some of it too wide for a phone."""
    make(folder, map(full, range(1, steps + 1)), config__yaml=f"model: <b>{'y' * 300}", trained__txt="trained " * 40)
    write(folder / "validation.jsonl", [{"step": i, "loss": 4.25, "source_loss": [["books/*.txt", 8.5, 2]]}
                                        for i in range(10, 41, 10)])  # fmt: skip
    write(folder / "state_norms.jsonl", [{"step": i, "norms": [[1.0 * i, 2.0], [3.0, 4.5], []]} for i in (20, 40)])
    plan = {"ranks": 2, "device": "cpu", "strategy": "ddp", "peak_memory_bytes": 123e6, "tokens_per_second": 4321.0}
    (folder / "planned.json").write_text(json.dumps(plan))
    pieces = [["S", [None]], ["<a>", [0.05]], ["é\n", [2.5, 3.5]], ["w" * 300, [9.0]], ["\x07", [None]], ["", [1.0]]]
    parts = [{"begin": 0, "pieces": pieces}, {"begin": 400, "pieces": pieces}]
    sample = {"source": "books", "held_out": True, "tokens": 5000, "segment_length": 128, "parts": parts}
    (folder / "samples.json").write_text(json.dumps([sample]))
    return folder


class Page(html.parser.HTMLParser):
    """Holds that every tag is closed in its order, and notes what is in the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.headings, self.ids, self.figures, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [x for name, x in attrs if name == "id"]
        if tag == "svg":
            self.figures.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [x for name, x in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


def page_of(folder):
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.headings == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert all(x["role"] == "img" and len(x["aria-label"]) > 20 for x in page.figures)
    assert "http" not in text and "<script" not in text and "@import" not in text
    links = [x for name, x in page.attributes if name in ("src", "href", "srcset", "poster", "data")]
    assert all(x.startswith(("data:", "#")) for x in links), links
    assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", text))
    assert "nan" not in " ".join(x["aria-label"] for x in page.figures)
    return page, text


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_page_of_an_old_run(tmp_path, steps):
    make(tmp_path, map(line, range(1, steps + 1)), validation__jsonl='{"step": 1, "loss": 4.25}\n')
    page, text = page_of(tmp_path)
    assert "4.2500" in text and f"{100 * steps:,}" in text and len(page.figures) == 6
    assert "This run noted no states" in text and "Not compared with a plan: this run has none" in text


@pytest.mark.parametrize("steps", [1, 40])
def test_page_shows_everything(tmp_path, steps):
    page, text = page_of(everything(tmp_path, steps))
    assert len(page.figures) == 10
    for said in ("model: &lt;b&gt;", "ddp on 2 of these", "123 MB a rank and 4,321", "matrices, rest", "tabindex",
                 "393 tokens later, in segment 4", "&lt;a&gt;", "é↵\n", "␇", "∎", "2 tokens, 6.00 nats"):  # fmt: skip
        assert said in text, said
    levels = re.findall(r'class="(\w+)" tabindex="-1" data-l="([^"]*)"', text)
    assert [x for x, _ in levels[:6]] == ["none", "l0", "l5", "l7", "none", "l3"]
    assert [x for _, x in levels[:4]] == [
        "not learnt, or the first token",
        "0.05 nats",
        "2 tokens, 6.00 nats",
        "9.00 nats",
    ]


def test_a_run_that_got_new_fields_on_its_way(tmp_path):
    """Resumed by a newer version; and a line that was torn when the process was killed."""
    rows = [*map(line, range(1, 9)), *map(full, range(9, 12)), {"step": 12, "tokens": 1200, "loss": None}]
    make(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "loss":')
    page, text = page_of(tmp_path)
    assert "1,200" in text and len(page.figures) == 8


def test_curves_of_a_long_run_are_thinned(tmp_path):
    steps = 20_000
    make(tmp_path, (full(i) for i in range(1, steps + 1)))
    page, text = page_of(tmp_path)
    assert "the mean of 20 steps in a row" in text and len(text) < 500_000
    lines, each = thinned(tmp_path / "metrics.jsonl")
    assert (len(lines), each) == (POINTS, 20)
    assert lines[0]["step"] == 20 and lines[0]["loss"] == pytest.approx(np.mean([5 / i for i in range(1, 21)]))
    assert lines[-1]["step"] == steps and f"{100 * steps:,}" in text


def test_mean_of_lines():
    rows = [
        {"step": 1, "peak_memory_bytes": 5, "loss": 1.0, "border_gradient": [[1, 3.0]], "source_loss": [["a", 2.0, 4]]},
        {"step": 2, "peak_memory_bytes": 4, "loss": 2.0, "border_gradient": [[1, 4.0], [2, 2.0]], "new": 7.0},
        {"step": 3, "peak_memory_bytes": 3, "source_loss": [["a", 1.0, 2], ["b", 9.0, 3]], "loss": None},
    ]
    assert mean(rows) == {
        "step": 3, "peak_memory_bytes": 5, "loss": 1.5, "source_loss": [["a", 3.0, 6], ["b", 9.0, 3]], "new": 7.0,
        "border_gradient": [[1, pytest.approx(12.5**0.5)], [2, pytest.approx(2**0.5)]],
    }  # fmt: skip


def test_some_lines_and_the_last(tmp_path):
    write(tmp_path / "a", [{"step": i} for i in range(10)])
    assert [x["step"] for x in some(tmp_path / "a", 4)] == [0, 3, 6, 9]
    assert len(some(tmp_path / "a", 10)) == 10 and some(tmp_path / "b") == []


def test_without_a_step(tmp_path):
    with pytest.raises(ValueError, match="no step was made yet"):
        write_report(make(tmp_path, []))
    with pytest.raises(FileNotFoundError, match="no run there"):
        write_report(tmp_path / "nowhere")


def test_norms_at_borders():
    squares = torch.zeros(len(DISTANCES), dtype=torch.float64)
    squares[0], squares[2] = 4.0, 1e-20
    assert border_norms(squares) == [[1, 2.0], [3, 1e-10]]


@pytest.mark.parametrize("arch", ARCHS)
def test_state_norms(arch):
    model = tiny_model(arch, n_layer=3)
    state = random_state(model, 2)
    found = state_norms(state)
    assert len(found) == 3
    for row, block in zip(found, state.blocks):
        heads = block.wkv.unflatten(1, (1, 3))[:, :, 0] / block.wkv[:, None, 1] if arch == "rwkv4" else block.wkv
        for head, x in enumerate(row):
            lanes = [float((heads[n, head] ** 2).sum()) ** 0.5 for n in range(2)]
            assert x == pytest.approx(sum(lanes) / 2)
        assert len(row) == (heads.shape[1] if block.wkv.numel() else 0)
    assert all(x == 0 for row in state_norms(model.initial_state(2)) for x in row)


def test_pieces_break_no_character():
    words = ByteTokenizer()
    text = "aé日🙂\n"
    tokens = [*words.encode(text).tolist(), 0]
    losses = [None, *map(float, range(1, len(tokens)))]
    found = list(_pieces(words, tokens, losses))
    assert [(begin, x) for begin, x, _ in found] == [(0, "a"), (1, "é"), (3, "日"), (6, "🙂"), (10, "\n"), (11, "")]
    assert [x for _, _, piece in found for x in piece] == losses
    broken = list(_pieces(words, tokens[:5], losses[:5]))
    assert "".join(x for _, x, _ in broken) == "aé\ufffd" and sum(len(x) for *_, x in broken) == 5


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run that was broken off and goes on, and whose model may still be asked."""
    project = make_project(tmp_path_factory.mktemp("project"), (900, 1100, 830, 61, 905, 950))
    (project / "texts" / "0.txt").write_text("日本語のテキスト🙂 und Äpfel. " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        options = ["-c", "recipe.yaml", "--name", "a", "--data.validation", "3", "--data.segment_length", "200"]
        run(patch, "fit", *options, "--trainer.max_epochs", "1")
        run(patch, "fit", *options, "--resume", "auto")
    return project / "runs" / "a"


def test_samples_are_losses_of_the_trained_model(fitted):
    samples = json.loads((fitted / "samples.json").read_text())
    model, words = load_model(fitted), ByteTokenizer()
    texts = {p.read_text() for p in (fitted.parents[1] / "texts").glob("*.txt")}
    assert len(samples) == 3 and all(x["held_out"] for x in samples)
    assert any(len(x["parts"]) == 2 for x in samples)
    for sample in samples:
        begin = "".join(text for text, _ in sample["parts"][0]["pieces"])
        (whole,) = (
            x for x in texts if x.startswith(begin.rstrip("\ufffd")) and len(x.encode()) + 1 == sample["tokens"]
        )
        tokens = torch.from_numpy(np.append(words.encode(whole), 0).astype(np.int64))
        with torch.no_grad():
            losses = F.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:], reduction="none")
        for part in sample["parts"]:
            ours = [x for _, piece in part["pieces"] for x in piece]
            expected = [None, *losses.tolist()][part["begin"] : part["begin"] + len(ours)]
            assert ours == pytest.approx(expected, abs=1e-3)
            assert len("".join(x for x, _ in part["pieces"]).encode()) in (len(ours), len(ours) - 1)


def test_states_are_noted_with_each_checkpoint(fitted):
    lines = [json.loads(x) for x in (fitted / "state_norms.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in lines]
    assert steps == sorted(set(steps)) and len(steps) > 2
    assert [len(x) for x in lines[-1]["norms"]] == [2, 2] and all(x > 0 for row in lines[-1]["norms"] for x in row)


def test_page_of_a_real_run(fitted):
    page, text = page_of(fitted)
    assert "the run took less than 60 s" in text and "blocks.0.att" in text and len(page.figures) == 9
    rates = dict(json.loads((fitted / "metrics.jsonl").read_text().splitlines()[-1])["group_lr"])
    assert rates["double"] == 2 * rates["matrices"] and "matrices, rest" in text


def test_planned_figures_stand_beside_the_measured(fitted, monkeypatch):
    monkeypatch.chdir(fitted.parents[1])
    run(monkeypatch, "report", "runs/a")
    plan = json.loads((fitted / "planned.json").read_text())
    assert plan["strategy"] == "single" and 1e6 < plan["peak_memory_bytes"] < 1e8 and plan["tokens_per_second"] > 100
    assert f"{plan['peak_memory_bytes'] / 1e6:,.0f} MB a rank and" in page_of(fitted)[1]
    noted = (fitted / "planned.json").stat().st_mtime_ns
    run(monkeypatch, "report", "runs/a")
    assert (fitted / "planned.json").stat().st_mtime_ns == noted


@pytest.mark.slow
def test_planned_figures_are_those_of_the_command(fitted, monkeypatch, capsys):
    monkeypatch.chdir(fitted.parents[1])
    run(monkeypatch, "report", "runs/a")
    plan = json.loads((fitted / "planned.json").read_text())
    with pytest.raises(SystemExit):
        run(monkeypatch, "plan", "-c", "runs/a/config.yaml", "--ranks", "1")
    names, row = (x.split() for x in capsys.readouterr().out.replace("peak MiB", "peak").splitlines()[-2:])
    assert row[names.index("peak")] == f"{plan['peak_memory_bytes'] / 2**20:.0f}"


def test_what_cannot_be_planned_says_why(tmp_path):
    from infctx.planning import note_plan

    make(tmp_path, [line(1)])
    gold = "model: {load: null, init: {arch: goldfinch, n_layer: 3, n_embd: 32, vocab_size: 50, head_size: 16}}"
    for text, why in (("", "No such file"), ("model: {load: null, init: null}", "give load"), (gold, "attention")):
        if text:
            (tmp_path / "config.yaml").write_text(text)
        note_plan(tmp_path, 4, torch.device("cpu"))
        noted = json.loads((tmp_path / "planned.json").read_text())
        assert noted["ranks"] == 4 and noted["device"] == "cpu" and why in noted["skipped"]
        text = page_of(tmp_path)[1]
        assert "Not compared with a plan: " in text and why in text


CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000"]  # fmt: skip
MEASURE = """<!doctype html><title>-</title>
<iframe src="report.html" style="border:0;width:390px;height:900px"></iframe>
<iframe src="report.html" style="border:0;width:1200px;height:900px"></iframe>
<script>onload=()=>{document.title=JSON.stringify([...document.querySelectorAll("iframe")].map(f=>{
const d=f.contentDocument,r=d.documentElement,css=x=>getComputedStyle(d.querySelector(x));return {
wide:r.scrollWidth,view:r.clientWidth,svg:d.querySelectorAll("svg").length,paper:css("body").backgroundColor,
ink:css("svg text").fill,line:css("svg path[style*='--line0']").stroke,text:css("svg text").fontSize,
loaded:d.defaultView.performance.getEntriesByType("resource").map(x=>x.name).filter(x=>!x.startsWith("data:"))}}))}
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(tmp_path, dark):
    """No scrolling sideways, on a phone or a screen; nothing is loaded; and colours go with the reader's."""
    folder = everything(tmp_path / "run")
    write_report(folder)
    (folder / "measure.html").write_text(MEASURE)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = f"--user-data-dir={tmp_path}/profile"
    command = ["chromium", *CHROMIUM, scheme, profile, "--allow-file-access-from-files", "--hide-scrollbars",
               "--window-size=1700,1000", "--dump-dom", f"file://{folder}/measure.html"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    phone, screen = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    for found, width in ((phone, 390), (screen, 1200)):
        assert found["wide"] <= found["view"] == width and found["svg"] == 10 and found["loaded"] == []
    assert float(phone["text"].removesuffix("px")) >= 9  # of a picture as wide as the page: drawn one to one
    paper, ink, stroke = (list(map(int, re.findall(r"\d+", phone[x])))[:3] for x in ("paper", "ink", "line"))
    assert contrast(paper, ink) >= 4.5 and contrast(paper, stroke) >= 3
    assert (sum(paper) < sum(ink)) == dark


def contrast(a, b):
    """By the W3C's definition."""

    def light(colour):
        linear = [x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read():
    """Of text on every colour of a loss, and of the lines of plots."""
    from infctx import report, samplepage

    def rgb(x):
        return [int(x[i : i + 2], 16) for i in (1, 3, 5)]

    for page, losses in ((report._LIGHT, samplepage._LIGHT), (report._DARK, samplepage._DARK)):
        ink, paper, soft, _, *lines = map(rgb, page)
        assert contrast(ink, paper) >= 7 and contrast(soft, paper) >= 4.5
        assert all(contrast(x, paper) >= 3 for x in lines)
        assert all(contrast(ink, rgb(x)) >= 4.5 for x in losses)


def test_folder_is_named_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path / "mine", [line(1)]))
    assert "<title>mine</title>" in write_report(Path()).read_text()
