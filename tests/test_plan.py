"""A forecast is what the step then takes; and a dry run finds the faults that a run would end with."""

import re
import resource
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ARCHS, make_project, run

import infctx
from infctx.borders import StatesConfig
from infctx.bptt import Gradient, WindowGradient, window_loss
from infctx.costs import Job, _simulate, measure
from infctx.devices import DEVICES, GIB, find
from infctx.engines import STRATEGIES, peak, phases_on
from infctx.ops.planned import KEEPS
from infctx.optim import OptimizerConfig, make_optimizer
from infctx.plan import Forecast, Run, forward_operations
from infctx.segments import Window

CUDA = Path(__file__).parents[1] / "cuda"


def job(arch="rwkv7", lanes=2, length=64, segments=3, layers=2, width=64, vocab=300, **options) -> Job:
    return Job(infctx.ModelConfig(arch, layers, width, vocab, 16), lanes, length, segments, **options)


def peak_of(phases) -> int:
    return peak(phases)[1].total()


def allocated(found: Job) -> int:
    """Most bytes that torch's own allocator says are alive at a time in the second step, with the model before it."""
    model = infctx.init_model(found.config, kernel=found.kernel)
    optimizer = make_optimizer(model, OptimizerConfig())
    shape = (found.lanes, found.segments, found.segment_length)
    ids, start = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    start[:, 0, 0] = True
    tokens = torch.randint(1, found.config.vocab_size, shape)

    def step():
        window = Window(tokens.clone(), tokens.clone(), start.clone(), ids.clone(), tokens.clone())
        with torch.autocast("cpu", torch.bfloat16) if found.precision == "bf16-mixed" else nullcontext():
            loss, _, _ = window_loss(model, window, None, found.horizon, 1, states=found.states)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [x for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return top + 4 * sum(p.numel() for p in model.parameters()) + 3 * 4 * trained


@pytest.mark.parametrize("arch", [x for x in ARCHS if not x.startswith("rwkv5.")])
def test_plan_is_what_the_allocator_sees(arch):
    found = job(arch)
    assert peak_of(measure(found).phases) == pytest.approx(allocated(found), rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"horizon": 1},
        {"segments": 12, "length": 16, "lanes": 4},
        {"segments": 12, "length": 16, "lanes": 4, "states": StatesConfig("every-3", "cpu")},
        {"kernel": "chunked"},
        pytest.param({"arch": "goldfinch", "segments": 9, "length": 128, "width": 32}, marks=pytest.mark.slow),
        {"arch": "rwkv4", "precision": "bf16-mixed"},
        {"vocab": 5000, "width": 32},
    ],
    ids=str,
)
def test_plan_of_options_is_what_the_allocator_sees(options):
    found = job(**options)
    assert peak_of(measure(found).phases) == pytest.approx(allocated(found), rel=0.03)


@pytest.mark.parametrize(("keep", "horizon"), [("all", None), ("every-2", None), ("all", 4), ("every-5", 1)])
def test_what_grows_with_segments_is_added(keep, horizon):
    found = job(segments=9, length=8, layers=1, lanes=8, width=32, horizon=horizon, states=StatesConfig(keep))
    costs, direct = measure(found), _simulate(found).phases
    row = 4 * found.lanes * costs.state
    assert all(abs(costs.phases[name].total() - direct[name].total()) < 2.1 * row for name in direct)


def test_forwards_are_counted_as_the_gradient_makes_them():
    class Counted(Gradient):
        runs = 0

        def _forward(self, segments, *rest):
            Counted.runs += len(segments)
            return super()._forward(segments, *rest)

    def counted(task, *given):
        return WindowGradient.apply(Counted, task, *given, *task.parameters())

    model = infctx.init_model(job().config)
    for segments, horizon, keep in [(7, None, "all"), (7, 3, "all"), (7, 1, "all"), (9, None, "every-2"),
                                    (9, 4, "every-3"), (5, None, "every-100")]:  # fmt: skip
        found = job(segments=segments, length=2, lanes=1, horizon=horizon, states=StatesConfig(keep))
        shape = (1, segments, 2)
        window = Window(*(torch.ones(shape, dtype=torch.long) for _ in range(2)), torch.zeros(shape, dtype=torch.bool),
                        torch.zeros(shape, dtype=torch.int32))  # fmt: skip
        Counted.runs = 0
        window_loss(model, window, None, horizon, states=found.states, runner=counted)
        assert found.forwards * segments == pytest.approx(Counted.runs), (segments, horizon, keep)


def test_nothing_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = measure(job(layers=2, width=4096, vocab=65536, length=2048, segments=100, lanes=8))
    assert peak_of(found.phases) > 30e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 300e6


def test_numbers_of_a_model():
    found, model = measure(job()), infctx.init_model(job().config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.state == sum(x[0].numel() for block in model.initial_state(1).blocks for x in block)
    assert forward_operations(job(), found) > 2 * (found.parameters - 300 * 64) * 0.9


def test_sizes_of_cuda_kernels_are_those_of_their_sources():
    def constant(name, file):
        return int(re.search(rf"{name} = (\d+)", (CUDA / file).read_text())[1])

    pairs = {"wkv4": constant("EVERY", "wkv4.cu"), "wkv6": constant("EVERY", "strips.cuh")}
    pairs |= {f"wkv{n}_mma": 2 * constant("LENGTH", f"wkv{n}_chunk.cuh") for n in (6, 7)} | {"wkv7": pairs["wkv6"]}
    assert {name: every for name, (every, _) in KEEPS.items()} == pairs
    for name, (_, vectors) in KEEPS.items():
        source = (CUDA / f"{name}.cu").read_text()
        assert f"{name}_keeps(int32_t, int64_t) {{ return {{EVERY, {vectors}}}; }}" in source


def test_a_gpu_is_planned_without_one():
    low, high = (measure(job(device="cuda", multiprocessors=132, precision=x)) for x in ("bf16-mixed", "fp32"))
    assert peak_of(low.phases) < peak_of(high.phases)
    assert infctx.ops.BACKENDS["cpu"] is infctx.ops.native.CPU


def test_strategies_cut_what_they_say():
    found = job(precision="bf16", layers=4)
    costs = measure(found)
    p, q = costs.parameters, costs.trained
    frames = {name: phases_on(cut, 4, costs, found)["window"] for name, cut in STRATEGIES.items()}
    assert frames["ddp"].total() == frames["single"].total() + 2 * q
    assert frames["zero2"]["masters"] == q and frames["zero2"]["optimizer"] == 2 * q
    assert frames["zero2"]["weights"] == 2 * p and frames["zero3"]["weights"] == p // 2
    assert frames["fsdp2"]["weights"] == p and frames["fsdp2"]["gradients"] == q
    on_gpu = replace(found, device="cuda", multiprocessors=132, states=StatesConfig(offload="cpu"))
    frame = phases_on(STRATEGIES["zero2-offload"], 4, costs, on_gpu)["window"]
    assert frame["host"] > 3 * q and frame["optimizer"] == frame["masters"] == 0
    assert frame["borders"] == 2 * 4 * found.lanes * costs.state


def test_a_longer_document_needs_no_more_of_a_gpu():
    """With border states in the host's memory, where the window is."""
    frames = []
    for segments in (64, 1024):
        longer = job(segments=segments, device="cuda", multiprocessors=132, states=StatesConfig(offload="cpu"))
        frames.append(phases_on(STRATEGIES["single"], 1, measure(longer), longer)["window"])
    short, long = frames
    assert long.total() - long["host"] == short.total() - short["host"]
    assert 15 < long["host"] / short["host"] < 17


def test_the_largest_that_fits_fits():
    found = job(lanes=1, length=128, segments=64, width=32, vocab=100)
    device = replace(DEVICES["h200"], kind="cpu", memory=20_000_000, reserve=0.0)
    (row,) = Forecast(Run(found, device)).rows([1])
    assert row.fits and row.longest > 128 and row.lanes > 1

    def bytes_with(**options):
        sized = replace(found, **options)
        return peak_of(measure(replace(sized, segments=-(-128 * 64 // sized.segment_length))).phases)

    assert bytes_with(segment_length=row.longest) < 1.05 * device.memory
    assert bytes_with(segment_length=row.longest * 5 // 4) > device.memory
    assert bytes_with(lanes=row.lanes) < 1.05 * device.memory < 1.3 * bytes_with(lanes=row.lanes)


def test_devices():
    assert find("h200").usable < 141 * GIB and find("h200").rate("bf16") > 10 * find("h200").rate("fp32")
    here = find("measured")
    assert here.memory > 1e8 and here.fp32 > 1e9 and here.bandwidth > 1e8
    with pytest.raises(ValueError, match="choose one of: measured, b200, h200"):
        find("h2000")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    return tmp_path / "project"


def command(monkeypatch, capsys, *argv, code=0):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *argv)
    assert (end.value.code or 0) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_plan_command(project, monkeypatch, capsys):
    given = ("plan", "-c", "recipe.yaml", "--device", "h200")
    error = command(monkeypatch, capsys, *given, "--data.segments_per_window", "document", code=2)
    assert "run `infctx prepare`, or give --tokens N" in error
    text = command(monkeypatch, capsys, *given, "--tokens", "33", "--ranks", "1", "4", "--explain")
    assert "2 lanes x 3 segments x 16 tokens" in text and "border states: ceil(3 / 3) + 3 + 1 rows" in text
    assert re.search(r"^single +1 ", text, re.M) and re.search(r"^fsdp2 +4 ", text, re.M)
    assert not re.search(r"^ddp +2 ", text, re.M) and not (project / "prepared").exists()
    command(monkeypatch, capsys, "prepare", "-c", "recipe.yaml")
    text = command(monkeypatch, capsys, *given, "--ranks", "2", "--data.segments_per_window", "document")
    assert "2 lanes x 15 segments x 16 tokens" in text and "h/epoch" in text and not (project / "runs").exists()
    for options, message in {
        ("--device", "h2000"): "is not known; choose one of",
        ("--model.kernel", "cpu"): "model.kernel cpu does not run on h200",
        ("--ranks", "0"): "--ranks must be at least 1",
        ("--ranks", "3", "--parallel.time", "2"): "no multiple of it",
        ("--trainer.precision", "16-mixed"): "choose bf16-mixed or 32-true",
        ("--model.horizon", "0"): "model.horizon must be at least 1",
        ("--model.init", "null"): "model: give load",
    }.items():
        assert message in command(monkeypatch, capsys, *given, *options, code=2)


def test_check_command(project, monkeypatch, capsys):
    given = ("check", "-c", "recipe.yaml")
    assert "run `infctx prepare` again" in command(monkeypatch, capsys, *given, code=2)
    command(monkeypatch, capsys, "prepare", "-c", "recipe.yaml")
    assert "as each of 1 ranks" in command(monkeypatch, capsys, *given)
    for options in (("--ranks", "2"), ("--ranks", "4", "--parallel.time", "2"),
                    ("--ranks", "2", "--parallel.time", "2", "--parallel.schedule", "scan")):  # fmt: skip
        text = command(monkeypatch, capsys, *given, *options)
        assert f"forward and backward, as each of {options[1]} ranks" in text and "no fault found" in text
    for options, message in {
        ("--ranks", "3", "--parallel.time", "2"): "no multiple of it",
        ("--ranks", "2", "--trainer.devices", "4"): "set trainer.devices to 2",
        ("--model.init.vocab_size", "100"): "set model.init.vocab_size to 257",
        ("--ranks", "2", "--trainer.strategy", "deepspeed_stage_2"): "trainer.strategy deepspeed_stage_2",
        ("--trainer.max_epochs", "-1"): "set trainer.max_epochs or trainer.max_steps",
        ("--data.validation", "6"): "takes 6 of 6 documents",
    }.items():
        assert message in command(monkeypatch, capsys, *given, *options, code=2)
    assert not (project / "runs").exists() and not torch.distributed.is_initialized()
