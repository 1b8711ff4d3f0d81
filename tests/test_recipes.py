"""Law 12: every recipe is what the parser takes, trains what it says, and runs, tiny, on data as it names them."""

import csv
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from test_formats import hub_tokenizer
from test_records import pair
from tiny import run, tiny_model

import infctx
from infctx.checkpoint import load_checkpoint, newest
from infctx.sizes import sized
from infctx.sources import as_sources, listed

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("recipe_table", ROOT / "benchmarks" / "recipes.py")
table = importlib.util.module_from_spec(spec)
sys.modules["recipe_table"] = table
spec.loader.exec_module(table)

RECIPES = table.recipes()
OVERLAYS = sorted((ROOT / "recipes" / "strategy").glob("*.yaml"))
DOCUMENTS = 40
VOCABULARIES = {"bytes": 257, "world": 65536}
# In published files, and never used; and what moves all scores of GoldFinch's attention alike.
PASSIVE = re.compile(r"blocks\.0\.att\.v[012]|.*time_faaaa|.*ln_k\.bias")


def text(number, length=60):
    random = np.random.default_rng(number)
    words = ["the", "state", "carries", "what", "was", "read", "on", "to", "its", "end"]
    return " ".join(random.choice(words, length // 4))


def record(source, number):
    """As the source's format wants it."""
    said = [text(number), text(number + 1000)]
    if source.format == "messages":
        keys = ("from", "value") if source.column == "conversations" else ("role", "content")
        roles = ("human", "gpt") if source.column == "conversations" else ("user", "assistant")
        return {source.column or "messages": [dict(zip(keys, x)) for x in zip(roles, said)]}
    if source.format == "instruction":
        return dict(zip(source.column_names, [said[0], "" if number % 2 else "more", said[1]]))
    return {source.column or "text": text(number, 5 * (source.min_tokens or 12))}


def write(source):
    """The files that a source names."""
    many = "*" in source.path
    for number in range(DOCUMENTS if many else 1):
        file = Path(source.path.replace("**", f"part{number % 2}").replace("*", str(number)))
        file.parent.mkdir(parents=True, exist_ok=True)
        count = min(DOCUMENTS, 6) if source.min_tokens and source.min_tokens > 100 else DOCUMENTS
        rows = [record(source, i) for i in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if source.format == "binidx":
            pair(file.parent, [[*map(ord, text(i)), 0] for i in range(DOCUMENTS)])
            for suffix in (".idx", ".bin"):
                Path(f"x{suffix}").rename(file.with_suffix(suffix))
        elif file.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), file)
        elif file.suffix == ".zst":
            file.write_bytes(pa.compress(lines.encode(), codec="zstd", asbytes=True))
        elif file.suffix == ".csv":
            out = io.StringIO()
            csv.writer(out).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
            file.write_text(out.getvalue())
        else:
            plain = text(number, 200 if many else 800)
            file.write_text({".jsonl": lines, ".json": json.dumps(rows)}.get(file.suffix, plain))


def prepare_folder(recipe):
    """Weights and data where the recipe looks for them. Returns: the weights' tensors, or None."""
    model, data = recipe.keys["model"], recipe.keys["data"]
    for source in listed(as_sources(data["source"])):
        write(source)
    vocabulary = VOCABULARIES.get(data["tokenizer"])
    if vocabulary is None:  # a name on the hub: a folder of that name comes first
        Path(data["tokenizer"]).mkdir(parents=True)
        vocabulary = hub_tokenizer(Path(data["tokenizer"]), None).vocab_size
    if "load" not in model:
        return None
    arch = recipe.arch_and_size[0]
    small = tiny_model(arch, torch.float32, 0.1, vocab_size=vocabulary, n_layer=3 if arch == "goldfinch" else 2)
    Path(model["load"]).parent.mkdir()
    infctx.save_model(small, model["load"])
    return dict(small.state_dict())


def sizes(recipe):
    """Nothing but sizes and what there is of devices, as options."""
    options = ["--data.segment_length=16", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.strategy=auto", "--parallel.time=1"]
    model = recipe.keys["model"]
    if "init" in model:
        options += ["--model.init.n_layer=2", "--model.init.n_embd=32", "--model.init.head_size=16"]
    if "warmup_tokens" in model["optimizer"]:
        options.append("--model.optimizer.warmup_tokens=100")
    if "rank" in model.get("tuning", {}):
        options.append("--model.tuning.rank=4")
    return options


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda x: x.file.stem)
def test_recipe_runs_tiny(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = prepare_folder(recipe)
    run(monkeypatch, "fit", "-c", str(recipe.file), "--name", "a", *sizes(recipe))
    lines = [json.loads(x) for x in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2] and all(np.isfinite(x["loss"]) for x in lines)
    assert (tmp_path / "runs/a/report.html").exists()
    out = capsys.readouterr().out
    cut = float(re.search(r"before their document begins: ([\d.]+)%", out)[1])
    whole = recipe.keys["data"]["segments_per_window"] == "document" and not recipe.keys["model"].get("horizon")
    assert (cut == 0) == whole
    weights, training = load_checkpoint(newest("runs/a"))
    moments = len(training["optimizer_states"][0]["state"])
    tuning = recipe.keys["model"].get("tuning")
    if tuning is None:
        if before is not None:
            same = {name for name in before if torch.equal(before[name], weights[name])}
            assert set(weights) == set(before) and all(PASSIVE.fullmatch(name) for name in same), same
    elif tuning["method"] == "state":
        changed = {name for name in weights if name not in before or not torch.equal(before[name], weights[name])}
        assert changed == {f"blocks.{i}.att.time_state" for i in range(2)}
        assert moments == len(changed) and all(weights[name].any() for name in changed)
    else:
        adapters = [name for name in weights if "lora_" in name]
        rest = [name for name in weights if name not in adapters]  # pissa takes its part out of the weights
        assert moments == len(adapters) > 0 and all(weights[name].any() for name in adapters)
        assert not rest or (tuning["method"] == "pissa" and all("base_layer" in name for name in rest))
    # as it is, but for the number of documents, on the devices that it names
    ranks = str(recipe.keys["trainer"].get("devices", 1))
    with pytest.raises(SystemExit, match=r"^0$"):
        run(monkeypatch, "check", "-c", str(recipe.file), "--ranks", ranks)
    assert "no fault found" in capsys.readouterr().out


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda x: x.stem)
def test_overlay_fits_on_a_recipe(overlay, tmp_path, monkeypatch, capsys):
    """That they train as one device does is test_strategies' to say."""
    monkeypatch.chdir(tmp_path)
    recipe = next(x for x in RECIPES if x.file.stem == "rwkv5-1b5-instruct")
    prepare_folder(recipe)
    with pytest.raises(SystemExit, match=r"^0$"):
        run(monkeypatch, "prepare", "-c", str(recipe.file))
    command = ["check", "-c", str(recipe.file), "-c", str(overlay), "--trainer.devices", "2", "--ranks", "2"]
    with pytest.raises(SystemExit, match=r"^0$"):
        run(monkeypatch, *command)
    assert f"strategy {overlay.stem};" in capsys.readouterr().out


def test_the_table_is_not_stale():
    written = (ROOT / "recipes" / "README.md").read_text()
    assert written == table.page(RECIPES), "run python benchmarks/recipes.py"


def test_headers_say_what_is_planned():
    for recipe in RECIPES:
        gib, strategy, ranks, command = recipe.planned.groups()
        assert 0 < float(gib) < 141 and f"-c recipes/{recipe.file.name}" in command
        assert f"--ranks {ranks}" in command
        assert recipe.header["Measured"].endswith(".")
        if recipe.arch_and_size:  # a published one, whose numbers the header says too
            config = sized(*recipe.arch_and_size)
            stem = "-".join(recipe.file.stem.split("-")[:2])
            assert recipe.keys["model"]["load"] == f"models/{stem}.pth"
            assert f"({config.n_layer} layers of {config.n_embd} channels" in recipe.header["Needs"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda x: x.file.stem)
def test_planned_memory_is_as_the_header_says(recipe):
    assert table.plan(recipe) == pytest.approx(float(recipe.planned[1]), rel=0.01)
