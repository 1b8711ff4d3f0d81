"""Adapters: exact gradients, frozen weights that stay, checkpoints of what is trained, peft's files."""

import json
from pathlib import Path

import pytest
import torch
from test_tuning import DOCUMENTS, window_of
from tiny import RECIPE, law, make_project, run, tiny_model, worst

import infctx
from infctx.bptt import window_loss
from infctx.loss import token_losses
from infctx.parts import freeze
from infctx.segments import sequences
from infctx.state import join, pack, select, unpack
from infctx.tuning.adapters import layers, merge, save_adapter
from infctx.tuning.config import PRESETS, Tuning
from infctx.tuning.tune import apply_tuning
from infctx.weights import load_tuned

peft = pytest.importorskip("peft")
FAMILIES = ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a", "goldfinch"]


def adapted(arch, method, dtype=torch.float64, **options):
    """A model with adapters that do something."""
    model = tiny_model(arch, dtype)
    freeze(model, apply_tuning(model, Tuning(method=method, rank=4, **options)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (n,), generator=generator) for n in DOCUMENTS]


CASES = [(arch, "lora") for arch in FAMILIES] + [("rwkv7", x) for x in PRESETS if x not in ("lora", "pissa")]


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_gradients_are_those_of_whole_documents(arch, method, record_property):
    model = adapted(arch, method, state_lr=0.1)
    learnt = [p for p in model.parameters() if p.requires_grad]
    loss, _, _ = window_loss(model, window_of(documents()), None)
    ours = torch.autograd.grad(loss, learnt)
    total = sum(
        torch.nn.functional.cross_entropy(model(d[None, :-1])[0][0], d[1:], reduction="sum") for d in documents()
    )
    expected = torch.autograd.grad(total / sum(n - 1 for n in DOCUMENTS), learnt)
    law(record_property, 1, arch, worst(ours, expected), 1e-10)


@pytest.mark.parametrize("arch", FAMILIES)
def test_gradients_with_dropout_are_those_of_autograd(arch, record_property):
    """The masks of each segment are those that a graph over the whole window draws with the same seeds."""
    model = adapted(arch, "lora", dropout=0.3).train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    window = window_of(documents())
    torch.manual_seed(11)
    loss, _, after = window_loss(model, window, None)
    ours = torch.autograd.grad(loss, learnt)
    torch.manual_seed(11)
    seed, total = int(torch.randint(2**62, ())), 0.0
    like = model.initial_state(1)
    lanes, keys = pack(like).expand(2, -1), [None] * 2
    for segment in range(window.tokens.shape[1]):
        s = sequences(window, segment)
        rows = torch.where(s.fresh.unsqueeze(1), pack(like), lanes[s.lane])
        memory = joined(like, keys, s) if like.memory is not None else None
        torch.manual_seed(seed + segment)
        x, out = model.features(s.tokens, unpack(rows, like, memory), s.cu_seqlens)
        total = total + token_losses(x[0], model.head.weight, s.targets)[0]
        lanes = torch.cat([pack(out), lanes])[s.last]
        if out.memory is not None:
            for lane, last in enumerate(s.last.tolist()):
                if last < len(s.lane):
                    keys[lane] = select(out, torch.tensor([last])).memory
    expected = torch.autograd.grad(total / int((window.targets != -100).sum()), learnt)
    assert torch.allclose(pack(after), lanes)
    law(record_property, 1, arch, worst(ours, expected), 1e-10)


def joined(like, keys, s):
    """What each sequence of a segment remembers, with the graph that made it."""
    parts = [like.memory if fresh or keys[lane] is None else keys[lane]
             for lane, fresh in zip(s.lane.tolist(), s.fresh.tolist())]  # fmt: skip
    return join(parts)


@pytest.mark.parametrize(("arch", "method"), [*CASES, ("rwkv7", "pissa")])
def test_merged_weights_give_the_same_logits(arch, method, tmp_path):
    model = adapted(arch, method, torch.float32)
    tokens = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    expected = model(tokens)[0]
    merge(model)
    assert not list(layers(model)) and set(model.state_dict()) == set(tiny_model(arch).state_dict())
    difference = (model(tokens)[0] - expected).detach().abs().max() / expected.detach().abs().max()
    assert float(difference) <= 1e-5
    assert not torch.allclose(tiny_model(arch, torch.float32)(tokens)[0], expected)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "miss"])
def test_peft_reads_the_files(method, tmp_path):
    model = adapted("rwkv7", method, torch.float32)
    save_adapter(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(tiny_model("rwkv7", torch.float32), tmp_path / "adapter")
    tokens = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    assert torch.equal(other.base_model.model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_run_with_an_adapter(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_project(tmp_path / "project", recipe=RECIPE))
    infctx.save_model(tiny_model("rwkv6", torch.float32, 0.1, vocab_size=257), "base.pth")
    tuning = f"{{method: {method}, rank: 4, dropout: 0.1, lr: 0.01, state_lr: 0.02}}"
    options = ["-c", "recipe.yaml", "--model.load", "base.pth", "--model.tuning", tuning, "--trainer.max_steps", "50",
               "--trainer.max_epochs", "20", "--checkpoint.every_n_steps", "25"]  # fmt: skip
    run(monkeypatch, "fit", "--name", "a", *options)
    losses = [json.loads(x)["loss"] for x in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-7:]) < 0.9 * sum(losses[:7])
    before, tuned = infctx.load_model("base.pth").state_dict(), load_tuned("runs/a")
    if method == "lora":
        held = torch.load("runs/a/checkpoints/step-50/training.pt", weights_only=True)["optimizer_states"][0]
        trained = [p for p in tuned.parameters() if p.requires_grad]
        assert sum(len(g["params"]) for g in held["param_groups"]) == len(trained) == 2 * 2 * 8 + 2
        named = {name.replace(".base_layer", ""): p for name, p in tuned.named_parameters()}
        assert all(torch.equal(named[name], x) for name, x in before.items())
    run(monkeypatch, "fit", "--name", "again", *options, "--resume", "runs/a/checkpoints/step-25")
    other = load_tuned("runs/again").state_dict()
    assert all(torch.equal(x, other[name]) for name, x in tuned.state_dict().items())
    tokens = torch.randint(1, 257, (1, 30), generator=torch.Generator().manual_seed(2))
    expected = tuned.eval()(tokens)[0]
    run(monkeypatch, "merge", "runs/a", "merged.pth")
    said = capsys.readouterr().out
    assert "largest difference" in said and "in float32, and a learnt initial state: merged.pth" in said
    merged = infctx.load_model("merged.pth")
    assert float((merged(tokens)[0] - expected).detach().abs().max() / expected.detach().abs().max()) <= 1e-5
    run(monkeypatch, "export", "runs/a", "exported.safetensors")
    assert torch.equal(infctx.load_model("exported.safetensors")(tokens)[0], merged(tokens)[0])
    run(monkeypatch, "export", "runs/a", "state.pth", "--what", "state")
    if method == "pissa":
        with pytest.raises(SystemExit):
            run(monkeypatch, "export", "runs/a", "adapter", "--what", "adapter")
        assert "has changed the weights" in capsys.readouterr().err
        return
    capsys.readouterr()
    run(monkeypatch, "export", "runs/a", "adapter", "--what", "adapter")
    assert "state is not in it: `infctx export runs/a FILE --what state` writes" in capsys.readouterr().out
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        x.name for x in (tmp_path / "project" / "adapter").iterdir()
    }
    infctx.save_model(tiny_model("rwkv6", torch.float32, 0.2, vocab_size=257), "base.pth")
    resumed = ("fit", "--name", "b", *options, "--resume", "runs/a/checkpoints/step-25")
    for argv, message in ((("merge", "runs/a", "x.pth"), "other weights now"), (resumed, "was not tuned on these")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *argv)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lore"}, "method lore is not known; choose one of: state, lora"),
        ({"method": "lora", "rank": 0}, "rank must be above 0"),
        ({"method": "lora", "dropout": 1.0}, "dropout must be"),
        ({"method": "lora", "shift": True}, "start and shift are of a learnt state"),
        ({"state_lr": 0.1}, "with method state give lr"),
        (
            {"method": "lora", "targets": ["*.nothing"]},
            r"no linear layer is named '\*.nothing'; there are",
        ),
        ({"method": "lora", "targets": ["head"]}, "head can have no adapter; take layers of blocks"),
        ({"method": "lora", "options": {"lora_alfa": 3}}, "lora_alfa is no option of peft's LoraConfig"),
        ({"method": "hra", "dropout": 0.1}, "method hra has none"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        apply_tuning(tiny_model("rwkv7"), Tuning(**options))
