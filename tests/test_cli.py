"""The command line itself. What it says of mistakes is in test_bad_inputs."""

import logging
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from tiny import make_project, run

from infctx.cli import main
from infctx.sources import Source
from infctx.tuning.config import Tuning

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


@pytest.mark.parametrize(("section", "kind"), [("data.source", Source), ("model.tuning", Tuning)])
def test_help_of_a_section_lists_its_keys(monkeypatch, capsys, section, kind):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "fit", f"--{section}.help")
    said = capsys.readouterr().out
    for field in fields(kind):
        assert (f"\n  --{section}.{field.name} " in said) == field.init, field.name
        assert not field.init or f"\n        {field.name}: " in kind.__doc__, field.name  # what the key is


def test_a_warning_of_bitsandbytes_is_left_out_and_no_other(capsys):
    with pytest.raises(SystemExit):
        main(["report", "nothing"])
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    told = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    records = [log.makeRecord(log.name, logging.WARNING, "", 0, x, ("why",), None) for x in (told, "other: %s")]
    assert [bool(log.filter(x)) for x in records] == [False, True]


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(project, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *FIT, "--trainer.accelerator", "gpu")
    told = "trainer: No supported gpu backend found! Choose trainer.accelerator cpu; for a GPU install torch for CUDA"
    assert told in capsys.readouterr().err


def test_debug_shows_where(project, monkeypatch):
    with pytest.raises(ValueError, match="segment_length"):
        run(monkeypatch, *FIT, "--data.segment_length", "0", "--debug")


def test_help_says_what_the_keys_mean(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "--help")
    text = capsys.readouterr().out
    for words in ("segments the gradient reaches back", "lanes on each device", "optimizer steps between"):
        assert words in text
