"""Law 7 on real data: the gradient of an optimizer step is that of its documents, however they are laid out."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHS, law, relative, tiny_model

from infctx.bptt import window_loss
from infctx.data import DocumentData
from infctx.sources import Source

LAYOUTS = [(1, 32), (2, 16), (4, 8), (32, 1)]  # lanes, windows in an optimizer step
# No two of the long ones fit into one lane of a window, so that each layout has a short last group or a short window.
LENGTHS = [*range(17, 33), *range(17, 33), 17, 20, 25, 30, 32, 1, 2, 3, 8, 14]


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.fixture
def documents(tmp_path):
    """Prompts and completions as they are prepared, in the hands of a trainer."""
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(97, 123, n))) for n in random.permutation(LENGTHS)]
    records = [{"prompt": x[: len(x) // 4], "completion": x[len(x) // 4 :]} for x in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = Source(str(tmp_path / "a.jsonl"), "completion")

    def laid_out(lanes, accumulate):
        data = DocumentData(source, str(tmp_path / "out"), segment_length=16, batch_size=lanes)
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, accumulate_grad_batches=accumulate,
                                       current_epoch=0, limit_train_batches=1.0)  # fmt: skip
        data.prepare_data()
        data.setup("fit")
        return data

    return laid_out


def of_documents(model, documents):
    """The gradient of each document's summed loss by plain autograd over all of it, and its supervised tokens."""
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for i, n in enumerate(documents.inputs.tolist()):
        ids = torch.from_numpy(documents.tokens(i, 0, n + 1).astype(np.int64))
        learnt = torch.from_numpy(documents.mask(i, 1, n + 1).copy())
        losses = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")[learnt]
        found.append((flat(torch.autograd.grad(losses.sum(), trained)), len(losses)))
    return found


def steps(model, data):
    """Each optimizer step of an epoch, as the module makes it: its gradient, and the documents in it."""
    trained, lanes = [p for p in model.parameters() if p.requires_grad], None
    windows, size = list(data.train_dataloader()), data.trainer.accumulate_grad_batches
    assert len(windows) > size and (size == 1 or len(windows) % size)  # a short last group
    for begin in range(0, len(windows), size):
        total, ids = 0.0, []
        for window in windows[begin : begin + size]:
            loss, _, lanes = window_loss(model, window, lanes, normaliser=window.normaliser)
            total = total + loss
            ids += window.ids[window.start].tolist()
        yield flat(torch.autograd.grad(total, trained)), ids


def check(arch, documents, record):
    model, wholes = tiny_model(arch, vocab_size=257), []
    alone = of_documents(model, documents(1, 1).train)
    for layout in LAYOUTS:
        whole, read = 0.0, []
        for gradient, ids in steps(model, documents(*layout)):
            tokens = sum(alone[i][1] for i in ids)
            law(record, 7, arch, relative(gradient, sum(alone[i][0] for i in ids) / tokens), 1e-8)
            whole, read = whole + gradient * tokens, read + ids
        assert sorted(read) == list(range(len(LENGTHS)))
        wholes.append(whole)
    for other in wholes[1:]:
        law(record, 7, arch, relative(other, wholes[0]), 1e-8)


@pytest.mark.parametrize("arch", ["rwkv6", "rwkv7"])
def test_a_step_does_not_depend_on_its_layout(documents, record_property, arch):
    check(arch, documents, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [x for x in ARCHS if x not in ("rwkv6", "rwkv7")])
def test_a_step_of_any_architecture_does_not_depend_on_its_layout(documents, record_property, arch):
    check(arch, documents, record_property)
