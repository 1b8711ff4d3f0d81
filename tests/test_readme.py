"""Law 12: every command of the README runs, tiny."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from tiny import run, tiny_model

import infctx

ROOT = Path(__file__).parents[1]
# What makes the recipe of the README a matter of seconds.
TINY = ["--model.init.n_layer=1", "--model.init.n_embd=32", "--model.init.head_size=16", "--data.segment_length=16"]
TINY += ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(x, comments=True) for x in lines if x.strip() and not x.startswith("#")]


def test_readme_commands_run(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "books").mkdir()
    for i in range(3):
        (tmp_path / "books" / f"{i}.txt").write_text(f"a book with the number {i} " * 15)
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    (tmp_path / "models").mkdir()
    infctx.save_model(tiny_model("rwkv7", torch.float32, 0.1, vocab_size=65536), "models/rwkv7-0b4.pth")
    seen = set()
    for words in commands():
        if words[0] == "infctx":
            quick = TINY if words[1] == "fit" else TINY[:-2] if words[1] == "validate" else []
            if any(x == "--model.load" or x.startswith("recipes/rwkv") for x in words):
                quick = [x for x in quick if "init" not in x]
            if quick and any(x.startswith("recipes/rwkv") for x in words):
                quick = [*quick, "--trainer.accelerator=cpu"]
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\nGo on.\n"))
            if "--trainer.devices" in words:  # Lightning starts the other ranks as copies of this process
                subprocess.run([sys.executable, "-m", "infctx", *words[1:], *quick], check=True, timeout=300)
                continue
            try:
                run(monkeypatch, *words[1:], *quick)
            except SystemExit as end:
                assert not end.code, words
            seen.add(words[1])
        elif words[0] == "make":
            assert set(words[1:]) <= TARGETS, words
        else:
            assert words[0] in ("git", "cd", "pip", "python", "torchrun"), f"no test runs {words}"
    assert {"fit", "validate", "prepare", "export", "generate", "report", "init", "convert", "chat", "preview"} <= seen


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
