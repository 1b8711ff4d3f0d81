"""Commands as a notebook runs them, without a notebook."""

import json
import subprocess
import sys
import threading
import time

import pytest
from tiny import make_project

from infctx import live


@pytest.mark.slow
def test_run_shows_output_and_follows_the_figures(tmp_path, monkeypatch, capsys):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = live.output("fit", "-c", "recipe.yaml", "--name", "a", "--trainer.max_steps", 3)
    lines = live.metrics("runs/a")
    assert [x["step"] for x in lines] == [1, 2, 3]
    shown = capsys.readouterr().out
    assert shown.startswith("$ infctx fit -c recipe.yaml --name a --trainer.max_steps 3\n")
    assert "report: runs/a/report.html" in shown and f"step 3: loss {lines[-1]['loss']:.3f}" in shown
    assert "report: runs/a/report.html" in text and "step 3:" not in text


def test_a_failing_command_raises_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(live.CommandError) as error:
        live.run("generate", "nothing.pth", "--prompt", "a")
    first, *rest = str(error.value).splitlines()
    assert first == "infctx generate: exit code 2"
    assert any(x.startswith("infctx: error: ") and "nothing.pth" in x for x in rest)


def test_what_is_typed_reaches_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = "import sys; print('typed', sys.stdin.read().split(), sys.argv[1:])"
    fake(monkeypatch, child)
    assert live.output("chat", "m.pth", stdin="one\ntwo\n") == "typed ['one', 'two'] ['chat', 'm.pth']\n"


def test_an_interrupt_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def stop(self, last=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.View, "look", stop)
    with pytest.raises(KeyboardInterrupt):
        live.run("fit")
    assert started[0].poll() is not None


def fake(monkeypatch, code):
    """Another program in place of the command."""
    real = subprocess.Popen

    def start(words, **options):
        assert words[:4] == [sys.executable, "-u", "-m", "infctx"]
        return real([sys.executable, "-u", "-c", code, *words[4:]], **options)

    monkeypatch.setattr(live.subprocess, "Popen", start)


def test_figures_are_shown_while_the_command_runs(tmp_path, monkeypatch, capsys):
    """And not only at its end: the child waits until the test has seen its first step."""
    monkeypatch.setattr(live, "EVERY", 0.05)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    fake(monkeypatch, "import os, time\nprint('run: r')\nwhile not os.path.exists('go'): time.sleep(0.02)")
    line = {"step": 7, "loss": 1.5, "tokens": 1234, "seconds": 2.0}
    (tmp_path / "r" / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 8, "lo')
    worker = threading.Thread(target=live.run, args=("fit",))
    worker.start()
    shown, end = "", time.monotonic() + 30
    while "step 7" not in shown and time.monotonic() < end:
        shown += capsys.readouterr().out
        time.sleep(0.02)
    (tmp_path / "go").touch()
    worker.join()
    assert "step 7: loss 1.500, 1,234 tokens, 2 s" in shown and "step 8" not in shown


def test_metrics_of_a_run_that_has_not_begun(tmp_path):
    assert live.metrics(tmp_path / "nowhere") == []


def test_fresh_folders_keep_what_is_there(tmp_path):
    first = live.fresh(tmp_path / "a" / "b")
    (first / "mine").touch()
    assert (first.name, live.fresh(tmp_path / "a" / "b").name) == ("001", "002")
    assert (first / "mine").exists()


def test_plot_draws_each_run_smoothed(tmp_path):
    from matplotlib.figure import Figure

    for name, losses in {"a": [4.0, 2.0, 0.0], "b": [1.0]}.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps({"step": i + 1, "loss": x}) + "\n" for i, x in enumerate(losses))
        (tmp_path / name / "metrics.jsonl").write_text(text)
    axis = Figure().subplots()
    live.plot(axis, {"first": tmp_path / "a", "second": tmp_path / "b"}, smooth=2)
    assert [list(x.get_ydata()) for x in axis.lines] == [[4.0, 3.0, 1.0], [1.0]]
    assert [x.get_text() for x in axis.get_legend().get_texts()] == ["first", "second"]


def test_importing_it_is_light():
    code = "import sys, infctx.live; print([x for x in ('IPython', 'matplotlib', 'lightning') if x in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
