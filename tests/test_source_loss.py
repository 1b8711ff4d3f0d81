"""The loss of each source is the sum over its documents, each run alone, however they lie in lanes, windows, steps."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from tiny import RECIPE, make_project, run, tiny_model

import infctx
from infctx.documents import ArrowDocuments
from infctx.segments import Plan

SOURCES = """
  source:
    - {path: texts/*.txt, format: text}
    - {path: chats.jsonl, format: completion, name: chats, weight: 2}
"""
# Weights that stay as they are for a whole run.
STILL = ["--model.load", "m.pth", "--model.optimizer.lr", "1.0e-30", "--trainer.accumulate_grad_batches", "2"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("sources"), (100, 37, 230, 61, 5, 150))
    one = "  source: {path: texts/*.txt, format: text}\n"
    assert one in RECIPE
    (folder / "two.yaml").write_text(RECIPE.replace(one, SOURCES.lstrip("\n")))
    chats = [{"prompt": f"what is {i} " * (i + 1), "completion": f"it is {i}" * i or "none"} for i in range(7)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    model = tiny_model("rwkv7", torch.float32, 0.1, vocab_size=257)
    infctx.save_model(model, folder / "m.pth")
    return folder


def rows(project, name, file="metrics.jsonl"):
    return [json.loads(x) for x in (project / "runs" / name / file).read_text().splitlines()]


def alone(documents):
    """Of each document: its summed loss and its supervised tokens, run alone in float64, by torch's own loss."""
    model = infctx.load_model("m.pth", torch.float64)
    found = []
    for i, n in enumerate(documents.inputs.tolist()):
        ids = torch.from_numpy(documents.tokens(i, 0, n + 1).astype(np.int64))
        learnt = torch.from_numpy(documents.mask(i, 1, n + 1).copy())
        with torch.no_grad():
            logits = model(ids[None, :-1])[0][0]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        found.append((float(losses[learnt].sum()), int(learnt.sum())))
    return found


def check(found, expected):
    assert [(name, tokens) for name, _, tokens in found] == [(name, tokens) for name, (_, tokens) in expected.items()]
    for name, loss, _ in found:
        assert loss == pytest.approx(expected[name][0], rel=1e-5)


@pytest.mark.parametrize("lanes, segments", [(3, "document"), (1, "document"), (2, "2")])
def test_losses_are_those_of_the_documents(project, monkeypatch, lanes, segments):
    monkeypatch.chdir(project)
    name = f"{lanes}-{segments}"
    options = ["--data.batch_size", str(lanes), "--data.segments_per_window", segments, "--trainer.max_epochs", "1"]
    run(monkeypatch, "fit", "-c", "two.yaml", "--name", name, *STILL, *options)
    lines, documents = rows(project, name), ArrowDocuments.open("prepared")
    losses, whole = alone(documents), defaultdict(lambda: (0.0, 0))
    chosen = np.concatenate([np.arange(6), np.arange(6, 13), np.arange(6, 13)])  # each chat twice
    for line in lines:
        assert sum(loss for _, loss, _ in line["source_loss"]) == pytest.approx(
            line["loss"] * sum(n for _, _, n in line["source_loss"])
        )
        for source, loss, tokens in line["source_loss"]:
            whole[source] = (whole[source][0] + loss, whole[source][1] + tokens)
    expected = {
        label: tuple(np.sum([losses[d] for d in chosen if documents.source[d] == number], 0))
        for number, label in enumerate(["texts/*.txt", "chats"])
    }
    check([[key, *whole[key]] for key in expected], expected)
    if segments != "document":
        return
    assert len(lines) > 1
    plan = Plan(documents.inputs, lanes, 16, None, 7, 0, _chosen(documents))
    for i, line in enumerate(lines):
        step = defaultdict(lambda: (0.0, 0))
        windows = range(2 * i, min(2 * i + 2, len(plan)))
        for piece in sorted(p.document for window in windows for p in plan.pieces(window)):
            source = documents.names[documents.source[piece]]
            step[source] = (step[source][0] + losses[piece][0], step[source][1] + losses[piece][1])
        check(line["source_loss"], step)


def _chosen(documents):
    from infctx.sources import chosen

    return chosen(documents.source, [1, 2], 0)


def test_validation_and_one_source(project, monkeypatch):
    monkeypatch.chdir(project)
    options = ["--data.validation", "5", "--trainer.val_check_interval", "1", "--trainer.max_steps", "2"]
    run(monkeypatch, "fit", "-c", "two.yaml", "--name", "held", *STILL, *options)
    documents = ArrowDocuments.open("prepared")
    held = np.sort(np.random.default_rng(0).permutation(13)[:5])
    losses, expected = alone(documents), defaultdict(lambda: (0.0, 0))
    for i in held:
        name = documents.names[documents.source[i]]
        expected[name] = tuple(np.add(expected[name], losses[i]))
    (*_, line) = rows(project, "held", "validation.jsonl")
    check(line["source_loss"], expected)
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "one", "--data.path", "alone", "--trainer.max_epochs", "1")
    for line in rows(project, "one"):
        ((name, loss, tokens),) = line["source_loss"]
        assert name == "texts/*.txt" and loss / tokens == pytest.approx(line["loss"])
    assert sum(line["source_loss"][0][2] for line in rows(project, "one")) == 583


def test_resumed(project, monkeypatch):
    monkeypatch.chdir(project)
    options = ["--trainer.accumulate_grad_batches", "2", "--checkpoint.every_n_steps", "1", "--trainer.max_epochs", "1"]
    run(monkeypatch, "fit", "-c", "two.yaml", "--name", "whole", *options)
    run(monkeypatch, "fit", "-c", "two.yaml", "--name", "later", *options, "--resume", "runs/whole/checkpoints/step-2")
    whole, later = ([x["source_loss"] for x in rows(project, name)] for name in ("whole", "later"))
    assert len(whole) > 2 and later == whole[2:]
