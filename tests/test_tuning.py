"""State tuning: the gradient of the learnt state is exact, the weights stay, and others read what comes of it."""

import pytest
import torch
from test_oracle import ask
from tiny import ARCHS, RECIPE, law, make_project, random_state, run, tiny_model, worst

import infctx
from infctx.bptt import window_loss
from infctx.layouts import to_layout
from infctx.parts import freeze
from infctx.segments import Window
from infctx.statefile import load_state, save_state, to_runtime
from infctx.tuning.config import Tuning
from infctx.tuning.states import export_state, names_to_learn
from infctx.tuning.tune import apply_tuning

DOCUMENTS = (21, 9, 30, 14)


def tuned_model(arch, dtype=torch.float64, shift=True, **sizes):
    """With a learnt state that is not zero."""
    model = tiny_model(arch, dtype, **sizes)
    freeze(model, apply_tuning(model, Tuning(shift=shift)))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in names_to_learn(model, shift):
            p = model.get_parameter(name)
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if p.dim() == 2:  # RWKV-4: a denominator above 0
                p[1].abs_()
    return model


def window_of(documents, length=8):
    """Two lanes, documents one after another."""
    lanes = [documents[::2], documents[1::2]]
    size = -(-max(sum(len(d) - 1 for d in lane) for lane in lanes) // length) * length
    tokens, targets = torch.zeros(2, size, dtype=torch.long), torch.full((2, size), -100)
    start, ids = torch.zeros(2, size, dtype=torch.bool), torch.full((2, size), -1, dtype=torch.int32)
    for row, lane in enumerate(lanes):
        at = 0
        for document in lane:
            end = at + len(document) - 1
            tokens[row, at:end], targets[row, at:end], ids[row, at:end] = document[:-1], document[1:], 1
            start[row, at], at = True, end
    return Window(*(x.view(2, -1, length) for x in (tokens, targets, start, ids)))


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_are_those_of_whole_documents(arch, record_property):
    model = tuned_model(arch)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 50, (n,), generator=generator) for n in DOCUMENTS]
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert len(learnt) == len(names_to_learn(model, True))
    loss, _, _ = window_loss(model, window_of(documents), None)
    ours = torch.autograd.grad(loss, learnt)
    total = sum(torch.nn.functional.cross_entropy(model(d[None, :-1])[0][0], d[1:], reduction="sum") for d in documents)
    expected = torch.autograd.grad(total / sum(n - 1 for n in DOCUMENTS), learnt)
    assert all(bool(g.any()) for g in expected)
    law(record_property, 1, arch, worst(ours, expected), 1e-10)


@pytest.mark.parametrize("arch", ARCHS)
def test_files_keep_the_learnt_state(tmp_path, arch):
    model = tuned_model(arch, torch.float32)
    tokens = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    expected, _ = model(tokens)
    for name in ("merged.pth", "merged.safetensors"):
        infctx.save_model(model, tmp_path / name)
        loaded = infctx.load_model(tmp_path / name)
        assert torch.equal(loaded(tokens)[0], expected)
    low = infctx.load_model(tmp_path / "merged.pth", torch.bfloat16)
    assert all(low.get_parameter(name).dtype == torch.float32 for name in names_to_learn(low, True))
    plain = tiny_model(arch, torch.float32)
    assert not torch.allclose(plain(tokens)[0], expected)
    export_state(model, str(tmp_path / "state.safetensors"))
    tuning = Tuning(start=str(tmp_path / "state.safetensors"), shift=True)
    apply_tuning(plain, tuning)
    assert torch.equal(plain(tokens)[0], expected)


@pytest.mark.parametrize("arch", ["rwkv5", "rwkv6", "rwkv7"])
def test_the_rwkv_package_begins_with_it(tmp_path, arch):
    """RWKV-5 and 6: merged into the weights; RWKV-7, of which it loads none: as the state that it is given."""
    model, plain = tuned_model(arch, torch.float32, shift=False), tiny_model(arch, torch.float32)
    infctx.save_model(model if arch != "rwkv7" else plain, tmp_path / "model.pth")
    tokens = torch.randint(1, 50, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    state = to_runtime(model.initial_state(1), arch) if arch == "rwkv7" else None
    file = tmp_path / ("model" if arch == "rwkv7" else "model.pth")
    pieces = {"whole": [tokens], "steps": [[t] for t in tokens]}
    (answer,) = ask(tmp_path, arch, [{"model": str(file), "state": state, "pieces": pieces}])
    ours = model(torch.tensor([tokens]))[0].detach()
    for way in pieces:
        assert float((ours[0] - answer[way]["logits"]).abs().max() / ours.abs().max()) <= 1e-5, way


def test_a_state_is_tuned_exported_and_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_project(tmp_path / "project", recipe=RECIPE))
    infctx.save_model(tiny_model("rwkv6", torch.float32, 0.1, vocab_size=257), "base.pth")
    tuned = ["-c", "recipe.yaml", "--model.load", "base.pth", "--model.tuning", "{method: state, lr: 0.05}",
             "--trainer.max_steps", "12", "--trainer.max_epochs", "9"]  # fmt: skip
    run(monkeypatch, "fit", "--name", "a", *tuned)
    before, after = infctx.load_model("base.pth").state_dict(), infctx.load_model("runs/a").state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert {name for name in after if name not in before} == {f"blocks.{i}.att.time_state" for i in range(2)}
    low = infctx.load_model("runs/a", torch.bfloat16)
    assert {x.dtype for name, x in low.state_dict().items() if name in before} == {torch.bfloat16}
    for i in range(2):
        assert torch.equal(low.get_parameter(f"blocks.{i}.att.time_state"), after[f"blocks.{i}.att.time_state"])
    saved = torch.load("runs/a/checkpoints/step-12/training.pt", weights_only=True)["optimizer_states"][0]
    (group,) = saved["param_groups"]
    assert len(group["params"]) == 2 and group["initial_lr"] == 0.05
    run(monkeypatch, "fit", "--name", "again", *tuned, "--resume", "runs/a/checkpoints/step-6")
    again = infctx.load_model("runs/again").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in after.items())
    run(monkeypatch, "export", "runs/a", "state.pth", "--what", "state")
    run(monkeypatch, "export", "runs/a", "merged.pth")
    file = torch.load("state.pth", weights_only=True)
    assert {name: tuple(x.shape) for name, x in file.items()} == {
        f"blocks.{i}.att.time_state": (2, 16, 16) for i in range(2)
    }
    base, merged = infctx.load_model("base.pth"), infctx.load_model("merged.pth")
    tokens = torch.randint(1, 257, (1, 30), generator=torch.Generator().manual_seed(2))
    state, _ = load_state("state.pth", base)
    assert torch.equal(base(tokens, state)[0], merged(tokens)[0])
    texts = []
    for argv in (["base.pth", "--state", "state.pth"], ["merged.pth"], ["base.pth"]):
        capsys.readouterr()
        run(monkeypatch, "generate", *argv, "--tokenizer", "bytes", "--prompt", "the", "--max_tokens", "20",
            "--temperature", "0")  # fmt: skip
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_what_cannot_be(tmp_path):
    model = tiny_model("rwkv7", torch.float32)
    save_state(random_state(model, 1), tmp_path / "after.safetensors", {"arch": "rwkv7"})
    save_state(random_state(model, 2), tmp_path / "two.safetensors", {"arch": "rwkv7"})
    for file, shift, message in (("after", False, "token shifts are not zeros: set model.tuning.shift"),
                                 ("two", True, "give the state of one sequence")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            apply_tuning(
                tiny_model("rwkv7", torch.float32), Tuning(start=str(tmp_path / f"{file}.safetensors"), shift=shift)
            )
    with pytest.raises(ValueError, match=r"model\.tuning\.lr must be above 0"):
        Tuning(lr=0.0)
    tuned = tuned_model("rwkv7", torch.float32)
    with pytest.raises(ValueError, match="would not begin with the learnt state"):
        infctx.save_model(tuned, tmp_path / "hf")
    weights = {**model.state_dict(), "blocks.1.ffn.time_state": torch.zeros(2, 16, 16)}
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.time_state: a rwkv7 model of these sizes has no such state"):
        infctx.load_model(tmp_path / "odd.pth")
    assert to_layout(model.state_dict(), model.config)
