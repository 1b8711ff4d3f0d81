"""The project in which the mistakes of bad_inputs.yaml are made, and what is said of each."""

import contextlib
import gzip
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import yaml
from safetensors.torch import save_file
from tiny import RECIPE, make_project, random_state, tiny_model

import infctx
from infctx.cli import main
from infctx.statefile import save_state


class Case(NamedTuple):
    """A mistake: what is wrong, the command, and words that its message must hold."""

    kind: str
    wrong: str
    command: str
    words: list[str]


def cases() -> list[Case]:
    """All of bad_inputs.yaml."""
    kinds = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [Case(kind, x["wrong"], x["run"], x["says"]) for kind, listed in kinds.items() for x in listed]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, and import from it."""
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def chat(*messages: dict[str, str | None]) -> str:
    return lines({"messages": messages})


def recipe(old: str, new: str) -> str:
    assert old in RECIPE
    return RECIPE.replace(old, new)


def weights(path: Path) -> None:
    """base.pth without a tensor."""
    tensors = torch.load("base.pth", weights_only=True)
    torch.save({name: x for name, x in tensors.items() if name != "blocks.1.ffn.value.weight"}, path)


def damaged(path: Path) -> None:
    shutil.copytree("runs/done", path)
    file = next(path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])


def moved(path: Path) -> None:
    """A run with adapters, on weights of another name."""
    shutil.copytree("runs/lora", path)
    for manifest in path.glob("checkpoints/*/manifest.json"):
        facts = json.loads(manifest.read_text())
        facts["base"]["path"] = str(Path(f"base-of-{path.name}.pth").absolute())
        manifest.write_text(json.dumps(facts))


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, ("exploded", "w"))


USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
FILES: dict[str, str | bytes | Callable[[Path], object]] = {
    "empty": Path.mkdir,
    "empty.txt": "",
    "latin.txt": "na\xefve".encode("latin-1"),
    "wide.txt": "text".encode("utf-16"),
    "short.txt.gz": gzip.compress(b"some text " * 100)[:-20],
    "plain.txt.gz": "plain text",
    "no.parquet": "PAR1 it says",
    "no.arrow": "text",
    "table.csv": "question,answer\nwhy,because\n",
    "body.csv": "title,body\na,b\n",
    "quote.csv": 'text,n\n"never closed,1\nb,2\n',
    "wide.csv": "text,n\na,1\nb,2,3\n",
    "number.jsonl": lines({"text": "a"}, 7),
    "broken.jsonl": lines({"text": "a"}) + "{'text': 'b'}\n",
    "huge.jsonl": "x" * (5 << 20),
    "rows.json": lines({"text": "a"}, {"text": "b"}),
    "under.json": json.dumps({"rows": [{"text": "a"}]}),
    "type.jsonl": lines({"text": "a"}, {"text": 2}),
    "lacks.jsonl": lines(*[{"prompt": "a", "completion": "b"}] * 2, {"completion": "b"}),
    "role.jsonl": chat({"content": "hi"}, REPLY),
    "null.jsonl": chat(USER, {"role": "assistant", "content": None}),
    "narrator.jsonl": chat(USER, {"role": "narrator", "content": "x"}),
    "said.jsonl": lines({"messages": "hi"}),
    "half.bin": "x",
    "odd.idx": "index",
    "odd.bin": "x",
    "fails.py": "def document(record, tokenizer):\n    return record['boddy']\n",
    "typo.yaml": recipe("  tokenizer:", "  tokeniser:"),
    "section.yaml": recipe("trainer:", "trainr:"),
    "place.yaml": recipe("model:\n", "model:\n  batch_size: 4\n"),
    "tab.yaml": recipe("  path: prepared", "\tpath: prepared"),
    "bracket.yaml": "\nmodel: [\n",
    "colon.yaml": recipe("tokenizer: bytes", "tokenizer:bytes"),
    "rate.yaml": recipe("lr: 1.0e-2", "lr: 1.0e-2x"),
    "twice.yaml": recipe("  batch_size: 2", "  batch_size: 2\n  batch_size: 4"),
    "none.yaml": "",
    "list.yaml": "- a\n- b\n",
    "code.yaml": "model: !!python/object/apply:os.mkdir [exploded]\n",
    "nodata.yaml": RECIPE.split("data:")[0],
    "strategy": lambda path: path.symlink_to(Path(__file__).parents[1] / "recipes" / "strategy"),
    "runs/damaged": damaged,
    "runs/gone": moved,
    "runs/other": moved,
    "base-of-other.pth": lambda path: infctx.save_model(tiny_model("rwkv7", torch.float32, 0.2, vocab_size=257), path),
    "adapter": lambda path: quietly(f"export runs/lora {path} --what adapter"),
    "half.pth": lambda path: path.write_bytes(Path("base.pth").read_bytes()[:9000]),
    "page.safetensors": "<html>404</html>",
    "lack.pth": weights,
    "llama.safetensors": lambda path: save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}, path),
    "bomb.pth": lambda path: torch.save({"emb.weight": Bomb()}, path),
    "rosa.pth": lambda path: torch.save({"blocks.0.rosa.q.weight": torch.zeros(4, 4)}, path),
    "trainer.pth": lambda path: torch.save({"epoch": 3, "model": {}}, path),
    "bad.json": "{}",
    "gap.txt": "a\n\nb\n",
    "tools.json": '{"name": "f"}',
    "list.json": '[{"name": "f"}]',
}


def make_bad_project(folder: Path) -> None:
    """A project with all that the cases find."""
    make_project(folder)
    with inside(folder):
        base = tiny_model("rwkv7", torch.float32, 0.1, vocab_size=257)
        infctx.save_model(base, "base.pth")
        infctx.save_model(tiny_model("rwkv7", torch.float32, 0.1), "small.pth")
        large, deep = (tiny_model("rwkv7", torch.float32, **size) for size in ({"n_embd": 64}, {"n_layer": 3}))
        save_state(base.initial_state(1), "state.pth")
        save_state(large.initial_state(1), "large.pth")
        six = tiny_model("rwkv6", torch.float32)
        for model, name, n in ((deep, "deep", 1), (six, "six", 1), (base, "two", 2), (base, "read", 1)):
            save_state(random_state(model, n), f"{name}.safetensors", {"arch": model.config.arch})
        lora = "--model.load base.pth --model.tuning '{method: lora, rank: 4}'"
        for name, options in {"done": "", "lora": lora}.items():
            code, said = quietly(f"fit -c recipe.yaml --name {name} --trainer.max_steps 2 {options}")
            assert code == 0, said
        for name, content in FILES.items():
            if callable(content):
                content(Path(name))
            else:
                Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def quietly(command: str) -> tuple[int, str]:
    """What a command ends with, run in this process, and what it says on stderr, with paths as seen from here."""
    argv = ["infctx", *shlex.split(command)]
    said, out = io.StringIO(), io.StringIO()
    code = 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        try:
            main(argv[1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return code, said.getvalue().replace(f"{Path.cwd()}/", "")


def row(case: Case, said: str) -> str:
    """Of the table."""
    message = " / ".join(line.strip() for line in said.strip().splitlines())
    return f"| {case.wrong} | {_code(f'infctx {case.command}')} | {_code(message)} |"


def _code(text: str) -> str:
    """As Markdown has it inside a table."""
    escaped = text.replace("|", r"\|")
    return f"`` {escaped} ``" if "`" in escaped else f"`{escaped}`"
