"""Kernels are built once, whoever asks first and however the last builder died; without a compiler it says so."""

import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infctx.ops import backends, build

SLOW_COMPILER = """#!{python}
import pathlib, subprocess, sys, time
if "-c" in sys.argv:
    pathlib.Path({log!r}).open("a").write("compile\\n")
    time.sleep({seconds})
sys.exit(subprocess.run([{compiler!r}, *sys.argv[1:]]).returncode)
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """One small source in place of the kernels, and an empty home."""
    folder = tmp_path / "a folder: of $ources"
    folder.mkdir()
    (folder / "one.cpp").write_text('#include "one.h"\nextern "C" int answer() { return ANSWER; }\n')
    (folder / "one.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return folder


def compile_one(compiler="g++"):
    return build._build("cpu", compiler, "-fPIC", {"one.cpp": ""}, "-shared")


def answer(library):
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def logging_compiler(tmp_path, seconds):
    file, log = tmp_path / "compiler", tmp_path / "log"
    text = SLOW_COMPILER.format(python=sys.executable, log=str(log), seconds=seconds, compiler=shutil.which("g++"))
    file.write_text(text)
    file.chmod(0o755)
    return str(file), log


def test_built_once_and_again_when_a_header_changes(sources, capsys):
    first = compile_one()
    assert answer(first) == 42 and capsys.readouterr().err.count("\n") == 1
    assert compile_one() == first and not capsys.readouterr().err
    (sources / "one.h").write_text("#define ANSWER 43\n")
    assert answer(compile_one()) == 43


def test_an_error_of_the_compiler_is_said_in_a_line_and_leaves_nothing(sources, tmp_path):
    (sources / "one.cpp").write_text("int answer() { return nothing; }")
    with pytest.raises(RuntimeError, match=r"did not compile: .*nothing") as error:
        compile_one()
    assert "\n" not in str(error.value)
    assert not [x for x in (tmp_path / "home").rglob("*") if x.is_file() and x.suffix != ".lock"]


def test_several_processes_build_once(sources, tmp_path):
    compiler, log = logging_compiler(tmp_path, 0.5)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=compile_one, args=(compiler,)) for _ in range(3)]
    for x in workers:
        x.start()
    for x in workers:
        x.join()
    assert [x.exitcode for x in workers] == [0, 0, 0] and log.read_text() == "compile\n"


def test_a_builder_that_dies_holds_nobody_up(sources, tmp_path):
    compiler, log = logging_compiler(tmp_path, 1.0)
    worker = multiprocessing.get_context("fork").Process(target=compile_one, args=(compiler,))
    worker.start()
    while not log.exists():
        time.sleep(0.01)
    worker.kill()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    library = compile_one(compiler)
    assert answer(library) == 42 and log.read_text().count("compile") == 2
    assert [x.name for x in library.parents[1].iterdir() if x.name.startswith(".")] == []


def test_no_compiler(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found"):
        build.build_cpu()
    monkeypatch.setattr(backends.native, "CPU", backends.native.Native(build.build_cpu))
    assert backends._automatic.__wrapped__("cpu") == "chunked"
    assert "no C++ compiler found" in caplog.text and "slower" in caplog.text


def test_home_that_can_not_be_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "home").write_text("a file")
    assert tmp_path in compile_one().parents
