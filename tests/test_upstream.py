"""Recipes of RWKV-infctx-trainer become ours, and no key goes unmentioned."""

from pathlib import Path

import pytest
import yaml
from tiny import make_project, run, tiny_model

import infctx
from infctx.upstream import convert_recipe

OLD = """
seed_everything: true
trainer:
  accelerator: auto
  devices: 1
  num_nodes: 1
  strategy: auto
  precision: bf16
  max_epochs: 1
  target_batch_size: 6
  microbatch_size: 2
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: ../checkpoint, monitor: step, mode: max, save_top_k: 2, every_n_train_steps: 100}
model:
  load_model: start.pth
  ctx_len: 32
  ctx_len_cutoffs: []
  bptt_learning: true
  bptt_learning_range: -1
  bptt_truncated_learning: false
  grad_cp: true
  lr_init: 1.0e-3
  lr_final: 1.0e-4
  lr_type: linear
  lr_period: -1
  warmup_steps: 3
  beta1: 0.9
  beta2: 0.99
  adam_eps: 1.0e-8
  weight_decay: 0.01
data:
  data_path: prepared/
  source: text
  source_dataset_params: {data_files: "texts/*.txt"}
  test_split: 1
  tokenizer: world
  text_rechunk_size: 2048
  min_token_size: 2
  packing_enable: true
ckpt_path: null
"""
DATAPACK = """
datapack: {data_path: packed/, mixing_mode: shuffle, packing_batchsize: 64}
default:
  tokenizer: world
  min_token_size: 8
  max_token_size: -1
dataset:
  - source: teven/code_contests
    name: contests
    multi_column_keys: [instruction, output]
    multi_column_prefix: ["### Instruction:\\n", "### Output:\\n"]
    multi_column_suffix: ["", ""]
    multi_column_train_mask: [false, true]
    multi_column_separator: "\\n\\n"
  - source: json
    source_dataset_params: {data_files: chats.jsonl}
    conversation_format: sender
    conversation_key: conversations
    dataset_weight: 2.0
  - source: text
    source_data_dir: books
  - source: csv
    source_data_dir: notes.csv
"""


def keys_of(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            yield from keys_of(value, f"{key}.")
        else:
            yield f"{prefix}{key}"


def test_a_recipe_runs_after_it(tmp_path, monkeypatch, capsys):
    project = make_project(tmp_path / "project")
    monkeypatch.chdir(project)
    Path("old.yaml").write_text(OLD)
    infctx.save_model(tiny_model("rwkv6", vocab_size=65536).float(), "start.pth")
    run(monkeypatch, "convert-recipe", "old.yaml", "new.yaml")
    said = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in said[:-1]}
    assert set(told) == set(keys_of(yaml.safe_load(OLD)))
    assert told["model.bptt_truncated_learning"].startswith("changed") and told["trainer.max_epochs"] == "kept"
    new = yaml.safe_load(Path("new.yaml").read_text())
    assert new["trainer"]["accumulate_grad_batches"] == 3 and new["data"]["batch_size"] == 2
    assert new["model"]["horizon"] is None and new["model"]["optimizer"]["schedule"] == "linear"
    assert new["checkpoint"] == {"every_n_steps": 100, "keep": 2} and new["data"]["validation"] == 1
    quick = ["--trainer.max_steps", "2", "--data.segments_per_window", "2", "--trainer.enable_progress_bar", "false"]
    run(monkeypatch, "fit", "-c", "new.yaml", "--name", "a", "--trainer.accelerator", "cpu", *quick)
    assert Path("runs/a/report.html").exists()


def test_a_datapack_becomes_a_list_of_sources(tmp_path):
    old, new = tmp_path / "pack.yaml", tmp_path / "new.yaml"
    old.write_text(DATAPACK)
    convert_recipe(str(old), str(new))
    data = yaml.safe_load(new.read_text())["data"]
    contests, chats, books, notes = data["source"]
    assert (data["path"], data["tokenizer"]) == ("packed/", "world")
    assert contests == {
        "path": "hf:teven/code_contests", "split": "train", "format": "instruction",
        "columns": ["instruction", "output"], "prefix": ["### Instruction:\n", "### Output:\n"],
        "suffix": ["\n\n", ""], "learn": ["output"], "min_tokens": 8, "name": "contests",
    }  # fmt: skip
    assert chats == {"path": "chats.jsonl", "format": "messages", "template": "world", "column": "conversations",
                     "min_tokens": 8, "weight": 2.0}  # fmt: skip
    assert books == {"path": "books", "format": "text", "min_tokens": 8}
    assert notes == {"path": "notes.csv", "format": "text", "min_tokens": 8, "column": "text"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("dropout: 0.1", "model"), "model.dropout: there is dropout in adapters only"),
        (("lr_period: 3", "model"), "model.lr_period: a schedule goes over the whole run"),
        (("strategy: hpu", "trainer"), "trainer.strategy: hpu: choose a file of recipes/strategy"),
        (("devices: auto", "trainer"), "trainer.target_batch_size: set trainer.devices to a number"),
        (("conversation_sender_mask: {user: true}", "data"), "data.conversation_sender_mask: name the roles"),
        (("made_up: 3", "data"), "data.made_up: no such key is known"),
        (("made_up: 3", "model"), "model.made_up: no such key is known"),
        (("text_rechunk_force: true", "data"), "data.text_rechunk_force: documents of any length are read whole"),
    ],
)
def test_what_is_refused_is_said(tmp_path, change, message):
    line, section = change
    recipe = yaml.safe_load(OLD)
    recipe[section] |= yaml.safe_load(line)
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=message):
        convert_recipe(str(tmp_path / "old.yaml"), str(tmp_path / "new.yaml"))
