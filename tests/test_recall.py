"""The study of recall: its documents ask for what they say, and a quick one runs, goes on, and writes its table."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import recall


def answers(document):
    """Of the questions that end a document, found by reading it from its first token."""
    said, asked = {}, []
    for token, following in zip(document, [*document[1:], None]):
        if recall.VALUES <= token < recall.VALUES + recall.KEYS and token not in said:
            said[token] = following
        if token == recall.ASK:
            asked.append(said.get(following))
    return asked


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_asked_was_said_in_the_first_segment(mixed):
    lanes = 20
    window = recall.window_of(torch.Generator().manual_seed(1), recall.statements, lanes, mixed, False)
    orders = set()
    for tokens, targets, ids in zip(*(x.flatten(1).tolist() for x in (window.tokens, window.targets, window.ids))):
        lengths = [ids.count(1), ids.count(2)]
        assert sum(lengths) == len(ids) and min(lengths) == recall.T
        orders.add(lengths[0] > lengths[1])
        for document in (1, 2):
            own = [i for i, x in enumerate(ids) if x == document]
            learnt = [targets[i] for i in own if targets[i] >= 0]
            expected = answers([tokens[i] for i in own])
            assert None not in expected and len(expected) == 1
            assert learnt == (expected if mixed or len(own) > recall.T else [])
    assert orders == {True, False}


def test_conditions_read_the_same_tokens():
    def window(*how):
        return recall.window_of(torch.Generator().manual_seed(1), recall.statements, 4, *how)

    one = window(True, False)
    for other in (window(False, False), window(True, True)):
        assert torch.equal(one.tokens, other.tokens)
    assert int(one.start.sum()) == 8
    assert torch.equal(window(True, True).start[:, :, 0], torch.ones(one.start.shape[:2], dtype=torch.bool))


def test_a_rule_is_marked_or_given():
    for rule in (None, 2):
        tokens, targets = recall.rules(torch.Generator().manual_seed(1), 50, 2, rule)
        for row, target in zip(tokens.flatten(1).tolist(), targets.flatten(1).tolist()):
            first = recall.VALUES + recall.KEYS
            marks = [x - first for x in row[: recall.T] if first <= x < recall.ASK]
            assert len(marks) == (rule is None)
            asked = [row[i + 1] for i, x in enumerate(row) if x == recall.ASK]
            chosen = (marks or [rule])[0]
            assert [x for x in target if x >= 0] == [(x + chosen) % recall.VALUES for x in asked]


def test_a_quick_study_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    argv = ["recall.py", "--quick", "--seeds", "0", "--archs", "rwkv7", "--regimes", "mixed", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    recall.main()
    runs = json.loads((tmp_path / "recall.json").read_text())["runs"]
    assert len(runs) == 2 * len(recall.HORIZONS)
    assert len((tmp_path / "recall.md").read_text().split("| all weights |")) == len(recall.HORIZONS) + 2
    assert "</svg>" in (tmp_path / "recall-mixed.svg").read_text()
    capsys.readouterr()
    monkeypatch.setattr(recall, "run", None)
    recall.main()
    assert "| state | mixed | rwkv7 | zero-state, as trained |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", argv[:1] + argv[2:])
    with pytest.raises(SystemExit, match="choose another --out"):
        recall.main()


def test_a_cut_gradient_does_not_reach_the_state_that_a_document_begins_with(monkeypatch):
    """Horizon 1 with far answers alone: what the study shows of it is by construction."""
    sizes = recall.QUICK | {"held_out": 2, "glance": 2}
    cases = [recall.Case("state", "far", "rwkv6", condition, 0) for condition in ("horizon 1", "exact")]
    states = []
    original = recall.train

    def noted(model, *args, **kwargs):
        figures = original(model, *args, **kwargs)
        states.append([p.abs().sum() for name, p in model.named_parameters() if name.endswith("time_state")])
        return figures

    monkeypatch.setattr(recall, "train", noted)
    recall.run(cases, sizes)
    _, cut, exact = states
    assert len(cut) == len(exact) == 2
    assert not any(cut) and all(exact)
