"""The command line itself. What it says of mistakes is in test_bad_inputs."""

import subprocess
import sys

import pytest
from tiny import make_project, run

FIT = ("fit", "-c", "recipe.yaml", "--name", "a")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    return tmp_path / "project"


def test_prepare_alone(project, monkeypatch, capsys):
    run_prepare = ("prepare", "-c", "recipe.yaml", "--data.path", "elsewhere")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *run_prepare)
    assert not end.value.code and "prepared elsewhere" in capsys.readouterr().out
    assert (project / "elsewhere" / "prepared.json").exists() and not (project / "runs").exists()


def test_the_three_ways_to_start(project):
    root = make_project.__globals__["Path"](__file__).parents[1]
    for command in (["-m", "infctx"], [str(root / "trainer.py")]):
        done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=True)
        assert all(x in done.stdout for x in ("fit", "validate", "prepare", "export", "generate", "report"))


def test_debug_shows_where(project, monkeypatch):
    with pytest.raises(ValueError, match="segment_length"):
        run(monkeypatch, *FIT, "--data.segment_length", "0", "--debug")


def test_help_says_what_the_keys_mean(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "--help")
    text = capsys.readouterr().out
    for words in ("segments the gradient reaches back", "lanes on each device", "optimizer steps between"):
        assert words in text
