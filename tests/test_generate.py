"""Text goes on from prompts, together or alone, in stretches or token by token, as the settings say."""

import dataclasses
import inspect
import json
import math
import random

import pytest
import torch
from tiny import ARCHS, run, tiny_model, worst

import infctx
from infctx.generate import Stream, generate, read, until
from infctx.sampling import Sampling, adjust, choose
from infctx.state import pack, select
from infctx.tokenizer import ByteTokenizer

WORDS = ByteTokenizer()
MODULE = inspect.getmodule(Stream)  # `infctx.generate` is the function
PROMPTS = ["a", "The state carries what was read", "ab\n", "x" * 21]


def model(arch="rwkv7", **sizes):
    return tiny_model(arch, vocab_size=257, **sizes)


def same(left, right):
    assert worst([pack(left)], [pack(right)]) < 1e-9
    if right.memory is not None:
        assert worst(left.memory[:3], right.memory[:3]) < 1e-9


def scripted(monkeypatch, *texts):
    """Whatever the model says, row r draws the bytes of texts[r], then the end of the document."""
    made = [[*WORDS.encode(text).tolist(), WORDS.end_of_document] for text in texts]

    def script(scores, sampling, generators):
        return torch.tensor([made[generator.initial_seed() - sampling.seed].pop(0) for generator in generators])

    monkeypatch.setattr(MODULE, "choose", script)


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_running_the_whole_text_each_time(arch):
    net, tokens = model(arch), WORDS.encode("abc").tolist()
    while len(tokens) < 15 and tokens[-1] != WORDS.end_of_document:
        tokens.append(int(net(torch.tensor([tokens]))[0][0, -1].argmax()))
    stream = Stream(net, WORDS, ["abc"], Sampling(12, temperature=0))
    assert stream.texts == [""]
    for _ in range(2):
        assert "".join(piece for _, piece in stream) == stream.texts[0] == WORDS.decode(tokens[3:])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_batch_gives_what_each_prompt_gives_alone(arch, monkeypatch):
    monkeypatch.setattr(MODULE, "STRETCH", 8)
    net = model(arch)
    options = dict(max_tokens=24, top_k=200, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2)
    options["stop"] = list("abcdefghijklmnop")
    together = generate(net, WORDS, PROMPTS, seed=5, **options)
    assert together == [generate(net, WORDS, prompt, seed=5 + row, **options) for row, prompt in enumerate(PROMPTS)]
    assert len({len(text) for text in together}) > 2  # rows end at different times


@pytest.mark.parametrize("arch", ARCHS)
def test_stretches_equal_token_by_token(arch, monkeypatch):
    net, before = model(arch), read(model(arch), [WORDS.encode("before")])[1]
    ids = [WORDS.encode(prompt) for prompt in PROMPTS]
    whole = read(net, ids, before)
    monkeypatch.setattr(MODULE, "STRETCH", 8)
    features, state = read(net, ids, before)
    assert worst([features], [whole[0]]) < 1e-9
    same(state, whole[1])
    for row, prompt in enumerate(ids):
        alone = before
        for token in prompt.tolist():
            x, alone = net.features(torch.tensor([[token]]), alone)
        assert worst([features[row]], [x[0, -1]]) < 1e-9
        same(select(state, torch.tensor([row])), alone)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_state_is_handed_over(arch):
    net, greedy = model(arch), {"temperature": 0.0, "max_tokens": 10}
    first = Stream(net, WORDS, ["ab", "The st"], Sampling(0))
    assert list(first) == [] and first.texts == ["", ""]
    parted = generate(net, WORDS, ["c", "ate"], state=first.state(), **greedy)
    assert parted == generate(net, WORDS, ["abc", "The state"], **greedy)
    shared = generate(net, WORDS, ["c", "cd"], state=select(first.state(), torch.tensor([0])), **greedy)
    assert shared == generate(net, WORDS, ["abc", "abcd"], **greedy)
    net(torch.tensor([[5], [6]]), first.state())[0].sum().backward()  # it may be trained on from there


@pytest.mark.parametrize("arch", ARCHS)
def test_the_state_has_read_prompts_and_texts(arch, monkeypatch):
    scripted(monkeypatch, "one. Two.", "longer than that", "", "end")
    net = model(arch)
    stream = Stream(net, WORDS, PROMPTS, Sampling(7, stop=["? ", ". T"], seed=3))
    list(stream)
    assert stream.texts == ["one", "longer ", "", "end"]
    read_again = [WORDS.encode(prompt + text) for prompt, text in zip(PROMPTS, stream.texts)]
    same(stream.state(), read(net, read_again)[1])


def test_pieces_are_whole_characters_and_no_part_of_a_stop_text(monkeypatch):
    texts = ["naïve 漢字 🙂 <end> more", "<en", "<<end>", "plain"]
    scripted(monkeypatch, *texts)
    stream, pieces = Stream(model(), WORDS, PROMPTS, Sampling(100, stop="<end>")), ["", "", "", ""]
    for row, piece in stream:
        assert piece and "<en" not in pieces[row]
        pieces[row] += piece
        assert texts[row].startswith(pieces[row])
    assert pieces == stream.texts == ["naïve 漢字 🙂 ", "<en", "<", "plain"]


def test_max_tokens_in_the_middle_of_a_character(monkeypatch):
    scripted(monkeypatch, "漢字")
    assert generate(model(), WORDS, "a", max_tokens=4) == "漢\ufffd"


def test_stop_texts_do_not_depend_on_how_the_text_is_cut():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab\n", k=draw.randrange(12)))
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randrange(4))]
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        pieces, left = [], text
        while left:
            size = draw.randint(1, 4)
            pieces, left = [*pieces, left[:size]], left[size:]
        found, stopped = [], until(stops, iter(pieces))
        while True:
            try:
                found.append(next(stopped))
            except StopIteration as end:
                assert end.value == bool(ends)
                break
        assert "".join(found) == (text[: min(ends)[1]] if ends else text) and all(found)


def test_the_end_of_the_document_ends_a_text_and_not_the_others(monkeypatch):
    scripted(monkeypatch, "ab", "", "abcdef", "c")
    assert generate(model(), WORDS, PROMPTS, max_tokens=5) == ["ab", "", "abcde", "c"]


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    net = tiny_model(vocab_size=300)
    with torch.no_grad():
        net.head.weight[257:] *= 1e3
    assert len(generate(net, WORDS, "a", max_tokens=50)) > 0


def test_seeds():
    net = model()
    draws = [generate(net, WORDS, "a", max_tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    greedy = generate(net, WORDS, "a", temperature=0.0)
    for option in ({"top_p": 1e-9}, {"top_k": 1}, {"temperature": 1e-320}):
        assert generate(net, WORDS, "a", seed=3, **option) == greedy


def test_draws_follow_the_probabilities():
    sampling, n = Sampling(temperature=0.7, top_p=0.8), 4000
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = (logits[0] / 0.7).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.8).sum()) + 1]
    expected = torch.zeros_like(p).scatter(0, kept, p[kept] / p[kept].sum())
    scores = adjust(logits, sampling, torch.zeros(1, 8, dtype=torch.bool), torch.zeros(1, 8))
    drawn = choose(scores.expand(n, -1), sampling, [torch.Generator().manual_seed(seed) for seed in range(n)])
    counts = torch.bincount(drawn, minlength=8) / n
    assert (counts - expected).abs().max() < 0.03
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_scores_equal_those_of_transformers(top_k, top_p, temperature):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(top_k)
    logits = 3 * torch.randn(5, 1000, generator=generator, dtype=torch.float64)
    ids = torch.randint(1000, (5, 30), generator=generator)
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(temperature)])
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    seen = torch.zeros(5, 1000, dtype=torch.bool).scatter(1, ids, True)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.3)
    ours = adjust(logits, sampling, seen, torch.zeros(5, 1000))
    torch.testing.assert_close(ours.softmax(-1), theirs(ids, logits).softmax(-1), rtol=1e-12, atol=0)


def test_penalties_by_hand():
    sampling = Sampling(temperature=0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0, 1.0]])
    seen, counts = torch.tensor([[True, True, False, False, True]]), torch.tensor([[0, 0, 0, 0, 3]])
    expected = torch.tensor([[2.0, -8.0, 4.0, -4.0, 0.5 - 0.75 - 0.5]])
    torch.testing.assert_close(adjust(logits, sampling, seen, counts), expected)


def test_penalties_count_the_text_and_repetition_the_prompt_too():
    net = model()
    with torch.no_grad():  # with no penalty, always the same letter
        net.head.weight.zero_()
        net.ln_out.bias.fill_(1.0)
        net.ln_out.weight.zero_()
        net.head.weight[[98, 99, 100]] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)[:, None] / 32
    greedy = {"temperature": 0.0, "max_tokens": 7}
    assert generate(net, WORDS, "a", **greedy) == "aaaaaaa"
    assert generate(net, WORDS, "a", presence_penalty=1.5, **greedy) == "abaaaaa"
    assert generate(net, WORDS, "a", frequency_penalty=0.6, **greedy) == "aababac"
    assert generate(net, WORDS, "a", repetition_penalty=2.0, **greedy) == "baaaaaa"


def test_the_public_function_has_the_defaults_of_sampling():
    assert infctx.generate is generate
    parameters = inspect.signature(generate).parameters
    fields = dataclasses.fields(Sampling)
    assert {field.name: parameters[field.name].default for field in fields} == {x.name: x.default for x in fields}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt must hold"),
        ([], {}, "prompt must hold"),
        (["a", ""], {}, "prompt must hold"),
        ("a", {"max_tokens": -1}, "max_tokens must be at least 0, got -1"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"temperature": math.nan}, "temperature"),
        ("a", {"top_k": -1}, "top_k"),
        ("a", {"top_p": 0.0}, "top_p"),
        ("a", {"repetition_penalty": 0.0}, "repetition_penalty"),
        ("a", {"presence_penalty": math.inf}, "presence_penalty"),
        ("a", {"frequency_penalty": math.nan}, "frequency_penalty"),
        ("a", {"stop": ["a", ""]}, "stop must be texts that are not empty"),
        ("a", {"stop": ""}, "stop must be"),
        ("a", {"seed": -1}, "seed"),
        (["a", "b", "c"], {"state": model().initial_state(2)}, "state holds 2 sequences for 3 prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), WORDS, prompt, **options)


def test_models_that_cannot_say_it_are_refused():
    with pytest.raises(ValueError, match="has 257 ids, the model only 50"):
        generate(tiny_model(), WORDS, "a")
    net = model()
    with torch.no_grad():
        net.head.weight[3, 3] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(net, WORDS, "a")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    infctx.save_model(model(dtype=torch.float32), "model.pth")
    return "model.pth"


def printed(monkeypatch, capsys, *argv):
    run(monkeypatch, "generate", *argv)
    return capsys.readouterr().out


def test_command(weights, monkeypatch, capsys):
    options = ["--max_tokens", "9", "--temperature", "0.9", "--top_k", "50", "--top_p", "0.9", "--seed", "3"]
    options += ["--repetition_penalty", "1.1", "--presence_penalty", "0.1", "--frequency_penalty", "0.1"]
    settings = Sampling(9, 0.9, 50, 0.9, 1.1, 0.1, 0.1, ["e", "\n\nf"], 3)
    text = generate(infctx.load_model(weights), WORDS, "ab", **dataclasses.asdict(settings))
    options += ["--tokenizer", "bytes", "--kernel", "reference", "--dtype", "float32", "--device", "cpu"]
    for stops in (["--stop", '["e", "\\n\\nf"]'], ["--stop+", "e", "--stop+", "\n\nf"]):
        assert printed(monkeypatch, capsys, weights, "--prompt", "ab", *options, *stops) == f"ab{text}\n"


def test_command_with_a_file_of_prompts(weights, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\nå\n", encoding="utf-8")
    for size in ("1", "2", "16"):
        out = printed(monkeypatch, capsys, weights, "--prompts", "prompts.txt", "--max_tokens=5", "--batch_size", size)
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["prompt"] for line in lines] == [*PROMPTS[:2], "å"]
        texts = generate(infctx.load_model(weights), WORDS, [*PROMPTS[:2], "å"], max_tokens=5)
        assert [line["text"] for line in lines] == texts


def test_command_hands_the_state_over(weights, monkeypatch, capsys):
    greedy = ["--temperature", "0"]
    whole = printed(monkeypatch, capsys, weights, "--prompt", "abcdef", "--max_tokens=8", *greedy)
    printed(monkeypatch, capsys, weights, "--prompt", "abcd", "--max_tokens=0", "--save_state", "a.safetensors")
    rest = printed(
        monkeypatch, capsys, weights, "--prompt", "ef", "--max_tokens=8", "--state", "a.safetensors", *greedy
    )
    assert "abcd" + rest == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--top_p", "2"], "top_p must be in (0, 1], got 2"),
        (["--prompt", "a", "--prompts", "prompts.txt"], "leave out prompt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "prompts.txt"], "prompts.txt: line 2 is empty"),
        (["--prompts", "model.pth"], "model.pth: not UTF-8"),
        (["--prompts", "prompts.txt", "--batch_size", "0"], "batch_size must be at least 1"),
        (["--prompt", "a", "--state", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--prompt", "a", "--dtype", "float8"], "dtype"),
        (["--prompt", "a", "--kernel", "fast"], "fast"),
        (["--prompt", "a", "--device", "abacus"], "device"),
    ],
)
def test_command_refuses(weights, monkeypatch, capsys, tmp_path, options, message):
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    with pytest.raises(SystemExit):
        printed(monkeypatch, capsys, weights, *options)
    output = capsys.readouterr()
    assert message in output.err and not output.out and len(output.err.splitlines()) <= 5
