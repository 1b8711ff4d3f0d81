"""Law 9 on real data: sources of several kinds and weights, prepared, planned, loaded and resumed, target by target.

What is expected is put together here, apart from the package: the tokens and masks that each record spells.
"""

import hashlib
import io
import json
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infctx.data import DocumentData
from infctx.documents import prepare
from infctx.formats import load_function
from infctx.segments import Plan
from infctx.sources import Source, chosen
from infctx.tokenizer import ByteTokenizer

WEIGHTS = [1.0, 2.0, 0.5, 1.0]
MOST = 30_000  # tokens of a document of the last source: longer ones are split
CALLED = """
import numpy as np
from infctx.segments import Document

def make(record):
    return Document(record["ids"], np.array(record["learn"], bool))
"""


def heavy_tailed(count, longest, seed=0):
    """Input tokens of documents: most are short, a few hold most of the tokens; both ends are there."""
    lengths = np.random.default_rng(seed).random(count) ** (-1 / 0.75)
    lengths[:2] = 1, longest
    return np.minimum(lengths, longest).astype(np.int64)


class Corpus:
    """Files of four kinds, and what their documents must come to, end to end.

    Attributes: sources; tokens (all tokens,); mask (all tokens,) bool; inputs, source (documents,).
    """

    def __init__(self, folder, count, longest):
        self.random, self.folder = np.random.default_rng(1), folder
        self._letters = self.random.integers(97, 123, 2 * longest).astype(np.uint8)
        made = [self._plain, self._completion, self._chat, self._called]
        lengths = [heavy_tailed(count // 4, longest, i) for i in range(4)]
        self.sources, rows, source = [], [], []
        for number, (kind, sizes) in enumerate(zip(made, lengths)):
            found, documents = kind([int(n) for n in self.random.permutation(sizes)])
            self.sources.append(found)
            rows += documents
            source += [number] * len(documents)
        self.source, self.inputs = np.array(source), np.array([len(tokens) - 1 for tokens, _ in rows])
        self.tokens, self.mask = (np.concatenate(x) for x in zip(*rows))
        self.begin = np.concatenate([[0], np.cumsum(self.inputs + 1)])
        self.mask[self.begin[:-1]] = False  # a first token is no target

    def _text(self, n):
        at = int(self.random.integers(len(self._letters) - n + 1))
        return self._letters[at : at + n].tobytes().decode()

    def _source(self, name, records, format, weight, **options):
        with (self.folder / name).open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        return Source(str(self.folder / name), format, weight=weight, **options)

    def _plain(self, sizes):
        """All is learnt; records behind the limit are not read."""
        texts = [self._text(n) for n in sizes]
        records = [{"text": x} for x in [*texts, *"behind", "the limit"]]
        return self._source("a.jsonl", records, "jsonl", WEIGHTS[0], limit=len(texts)), [spelt([(x, 1)]) for x in texts]

    def _completion(self, sizes):
        """The first tenth is the prompt."""
        pairs = [(x[: len(x) // 10], x[len(x) // 10 :]) for x in map(self._text, sizes)]
        records = [{"prompt": p, "completion": c} for p, c in pairs]
        source = self._source("b.jsonl", records, "completion", WEIGHTS[1])
        return source, [spelt([(p, 0), (c, 1)]) for p, c in pairs]

    def _chat(self, sizes):
        """Two turns each: what the assistant says is learnt, with the space before it and what closes it."""
        records, rows = [], []
        for n in sizes:
            one, two = self._text(-(-n // 3)), self._text(-(-n // 2))
            turns = [("user", one), ("assistant", two), ("user", "more"), ("assistant", one)]
            records.append({"messages": [{"role": role, "content": text} for role, text in turns]})
            rows.append(spelt([
                (f"User: {one}\n\nAssistant:", 0), (f" {two}\n\n", 1), ("User: more\n\nAssistant:", 0),
                (f" {one}\n\n", 1),
            ]))  # fmt: skip
        return self._source("c.jsonl", records, "messages", WEIGHTS[2], template="world"), rows

    def _called(self, sizes):
        """Masks full of holes, from a function; long documents are split, those without a target left out."""
        records, rows = [], []
        (self.folder / "ours_epochs.py").write_text(CALLED)
        for n in sizes:
            ids, learn = self.random.integers(1, 257, n + 1), self.random.random(n + 1) < 0.5
            records.append({"ids": ids.tolist(), "learn": learn.astype(int).tolist()})
            spans = [slice(i, i + MOST) for i in range(0, n, MOST - 1)] if n + 1 > MOST else [slice(0, n + 1)]
            rows += [(ids[x], learn[x].copy()) for x in spans if learn[x][1:].any()]
        source = self._source("d.jsonl", records, "ours_epochs:make", WEIGHTS[3], max_tokens=MOST, too_long="split")
        return source, rows

    def data(self, lanes, segments, epoch, length=512):
        """What a new process has after `setup`, in an epoch of a trainer."""
        data = DocumentData(self.sources, str(self.folder / "out"), "bytes", length, segments or "document", lanes)
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, accumulate_grad_batches=3, current_epoch=epoch,
                                       limit_train_batches=1.0)  # fmt: skip
        data.seed = 5
        data.setup("fit")
        return data

    def learnt(self, window):
        """Which targets a window learns, as places in `tokens`; that all it says is what the records spell."""
        real = window.ids >= 0
        at = self.begin[window.ids[real].numpy()] + window.position[real].numpy()
        targets, tokens = window.targets[real].numpy(), window.tokens[real].numpy()
        learnt = targets != -100
        assert (tokens == self.tokens[at]).all() and (learnt == self.mask[at + 1]).all()
        assert (targets[learnt] == self.tokens[at[learnt] + 1]).all()
        assert (window.targets[~real] == -100).all()
        return at[learnt] + 1

    def times(self, counts):
        """How often each document was read, from how often each place was learnt: all of its targets equally often."""
        assert not counts[~self.mask].any()
        spread = [f.reduceat(np.where(self.mask, counts, empty), self.begin[:-1]) for f, empty in
                  ((np.minimum, 2**30), (np.maximum, -1))]  # fmt: skip
        assert (spread[0] == spread[1]).all()
        return spread[0]


def spelt(parts):
    """Tokens and mask of stretches of text and an end: byte b is b + 1."""
    ids = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 1 for text, _ in parts]
    mask = [np.full(len(text), bool(learnt)) for text, learnt in parts]
    return np.concatenate([*ids, [0]]), np.concatenate([*mask, [True]])


def digest(window):
    """Equal where windows are."""
    real = window.ids >= 0
    total = hashlib.blake2b(f"{window.tokens.shape} {window.normaliser}".encode())
    for x in (np.packbits(real), *(x[real].numpy() for x in window[:5])):
        total.update(x)
    return total.hexdigest()


def as_a_checkpoint_has_it(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Corpora by their size, made and prepared once."""
    found = {}

    def get(*size):
        if size not in found:
            folder = tmp_path_factory.mktemp("epochs")
            found[size] = Corpus(folder, *size)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(sys, "dont_write_bytecode", True)
                patch.delitem(sys.modules, "ours_epochs", raising=False)
                load_function.cache_clear()
                prepare(found[size].sources, ByteTokenizer(), folder / "out")
        return found[size]

    return get


def read(corpus, lanes, segments):
    """Two epochs: how often each document was read in each, and the windows' digests."""
    times, digests = [], []
    for epoch in range(2):
        data, places, normalisers = corpus.data(lanes, segments, epoch), [], []
        assert data.train.inputs.tolist() == corpus.inputs.tolist()
        for window in data.train_dataloader():
            places.append(corpus.learnt(window))
            normalisers.append(window.normaliser)
            digests.append(digest(window))
        learnt = [len(x) for x in places]
        for i, normaliser in enumerate(normalisers):
            assert normaliser == max(1, sum(learnt[i - i % 3 : i - i % 3 + 3]))
        counts = np.bincount(np.concatenate(places), minlength=len(corpus.tokens))
        times.append(corpus.times(counts))
    return times, digests


def process(data, state):
    """From a checkpoint, or from the beginning, to the end of the second epoch: windows, and the state after each."""
    for epoch in range(data.trainer.current_epoch, 2):
        data.trainer.current_epoch = epoch
        loader = data.train_dataloader()
        if state is not None:
            loader.load_state_dict(state)
            state = None
        for window in loader:
            yield digest(window), loader.state_dict()


def check(corpus, lanes, segments, resumes):
    (first, second), whole = read(corpus, lanes, segments)
    for number, weight in enumerate(WEIGHTS):
        own = corpus.source == number
        if weight == 0.5:
            assert (first[own] + second[own] == 1).all() and abs(first[own].sum() - own.sum() / 2) <= 1
        else:
            assert (first[own] == weight).all() and (second[own] == weight).all()
    stops = np.sort(np.random.default_rng(lanes).integers(0, len(whole) + 1, resumes))
    found, state = [], None
    for count in np.diff([0, *stops, len(whole) + 1]):
        data = corpus.data(lanes, segments, 0 if state is None else state["epoch"])
        done = list(islice(process(data, state), int(count)))
        found += [seen for seen, _ in done]
        state = as_a_checkpoint_has_it(done[-1][1] if done else state)
    assert found == whole


@pytest.mark.parametrize(("lanes", "segments"), [(1, None), (6, None), (1, 3), (8, 4)])
def test_each_target_as_often_as_its_weight_says(corpora, lanes, segments):
    """Also when the reading is stopped at random places and goes on from a checkpoint."""
    check(corpora(2_000, 150_000), lanes, segments, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "segments"), [(1, None), (3, None), (8, None), (1, 16), (8, 4), (32, 8)])
def test_each_target_of_100000_documents(corpora, lanes, segments):
    check(corpora(100_000, 1_000_000), lanes, segments, 12)


@pytest.mark.parametrize("lanes", [1, 7, 32])
@pytest.mark.parametrize("segments", [4, None])
def test_a_plan_of_100000_documents_reads_each_input_once(lanes, segments):
    """By the borders of its pieces: between two of them no count changes."""
    inputs = np.concatenate([heavy_tailed(25_000, 1_000_000, i) for i in range(4)])
    begin = np.concatenate([[0], np.cumsum(inputs + 1)])[:-1]
    for epoch in range(2):
        rows = chosen(np.repeat(np.arange(4), 25_000), WEIGHTS, epoch)
        plan = Plan(inputs, lanes, 512, segments, 3, epoch, rows)
        pieces = [(lane, plan.borders[i] + place, document, first, last)
                  for i in range(len(plan)) for lane, place, document, first, last in plan.pieces(i)]  # fmt: skip
        lane, place, document, first, last = np.array(pieces).T
        order = np.lexsort((place, lane))
        over = (place + last - first)[order][:-1] > place[order][1:]
        assert not (over & (lane[order][:-1] == lane[order][1:])).any()  # no two in one place
        border, which = np.unique(
            np.concatenate([begin[document] + first, begin[document] + last]), return_inverse=True
        )
        count = np.bincount(which, np.repeat([1, -1], len(first))).cumsum()
        own = np.searchsorted(begin, border, "right") - 1
        end = border == begin[own] + inputs[own]
        times = np.bincount(rows, minlength=len(inputs))
        assert (count[end] == 0).all() and (count[~end] == times[own[~end]]).all()
        read = np.flatnonzero(times)
        assert np.isin(begin[read], border).all() and np.isin((begin + inputs)[read], border).all()
