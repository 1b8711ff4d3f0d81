"""A forecast is what the step then takes."""

import math
import re
import resource
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ARCHS

import infctx
from infctx.borders import StatesConfig
from infctx.bptt import Gradient, WindowGradient, window_loss
from infctx.costs import _all_layers, _simulate, measure
from infctx.devices import DEVICES, GIB, find
from infctx.engines import STRATEGIES, peak, phases_on
from infctx.job import Job
from infctx.ops.planned import KEEPS
from infctx.optim import OptimizerConfig, make_optimizer
from infctx.parts import Part
from infctx.plan import Forecast, Run, forward_operations
from infctx.plantext import explain, table
from infctx.segments import Window
from infctx.tuning.config import Tuning

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
    costs, direct = measure(found), _simulate(found, {}).phases
    row = 4 * found.lanes * costs.state
    assert all(abs(costs.phases[name].total() - direct[name].total()) < 2.1 * row for name in direct)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a"])
def test_what_grows_with_layers_is_added(arch, precision):
    length, vocab, device = (128, 2000, "cpu") if precision == "fp32" else (16, 500, "cuda")
    found = job(arch, 1, length, 2, layers=8, width=128, vocab=vocab, precision=precision, device=device)
    costs, direct = _all_layers(found, {}), _simulate(found, {})
    assert costs[1:] == direct[1:]
    for name, frame in direct.phases.items():
        assert costs.phases[name].total() == pytest.approx(frame.total(), rel=0.002), name


def test_few_layers_are_run():
    """The time of a plan does not depend on the depth of the model."""
    seconds = []
    for layers in (8, 200):
        begin = time.process_time()
        measure(job(layers=layers))
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 2 * seconds[0] + 1


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


def forecast(found: Job, megabytes: float, **options) -> Forecast:
    device = replace(DEVICES["h200"], kind="cpu", memory=int(megabytes * 1e6), reserve=0.0)
    return Forecast(Run(found, device, **options))


def test_the_largest_that_fits_fits():
    found = job(lanes=1, length=128, segments=64, width=32, vocab=100)
    (row,) = forecast(found, 20).rows([1])
    assert row.fits and row.longest > 128 and row.lanes > 1

    def bytes_with(**options):
        sized = replace(found, **options)
        return peak_of(measure(replace(sized, segments=-(-128 * 64 // sized.segment_length))).phases)

    assert bytes_with(segment_length=row.longest) <= 20e6 < bytes_with(segment_length=row.longest * 5 // 4)
    assert bytes_with(lanes=row.lanes) <= 20e6 < 1.3 * bytes_with(lanes=row.lanes)


def test_the_longest_segment_does_not_depend_on_the_recipes():
    rows = [forecast(job("rwkv4", 1, n, 8192 // n, 4, 32, 2000), 45).rows([1])[0] for n in (64, 256, 1024)]
    assert len({row.longest for row in rows}) == 1 and 1024 <= rows[0].longest < 8192


def test_only_longer_segments_fit():
    """The border states of many short segments are what does not."""
    found = job(lanes=8, length=16, segments=256, width=32, vocab=100)
    needed = peak_of(measure(found).phases) / 1e6
    (row,) = forecast(found, needed * 0.9).rows([1])
    assert not row.fits and row.longest > 16
    text = "\n".join(table([row], 16))
    assert re.search(r"^single .* longer ", text, re.M) and "fits longer: not with segments of 16 tokens" in text
    (row,) = forecast(found, 1).rows([1])
    assert not row.fits and row.longest == row.lanes == 0
    assert "nothing fits as it is: take more ranks" in table([row], 16)[-1]


def test_rows_of_a_wavefront_are_those_that_fit_takes():
    found = job(lanes=1, layers=1, width=32)
    for scan in (False, True):
        names = {row.cut.name for row in forecast(found, 50, time=2, scan=scan).rows([2])}
        assert ({"zero3", "zero3-offload", "fsdp2"} <= names) == scan and "zero2" in names


def test_equations_are_true():
    """Every `a x b = c` of --explain."""
    plan = forecast(job(segments=5), 50)
    lines = "\n".join(explain(plan, plan.rows([1, 2])))
    found = re.findall(r"((?:[\d,]+ x )+[\d,]+) = ([\d,]+) bytes", lines)
    assert len(found) == 3
    for factors, product in found:
        assert math.prod(int(x) for x in factors.replace(",", "").split(" x ")) == int(product.replace(",", ""))
    assert lines.count("engine and masters, by formula: as zero3") == 1


def test_devices():
    assert find("h200").usable < 141 * GIB and find("h200").rate("bf16") > 10 * find("h200").rate("fp32")
    assert find("H200") is find("h200") and find("rtx-4090") is find("RTX4090") and find("a10080") is find("a100-80")
    here = find("measured")
    assert here.memory > 1e8 and here.fp32 > 1e9 and here.bandwidth > 1e8
    with pytest.raises(ValueError, match="choose one of: measured, b200, h200"):
        find("h2000")


def test_what_is_tuned_is_planned():
    """Adapters and learnt states have the gradients and moments; what nothing is learnt from needs no gradient."""
    full, lora, state = (measure(job(layers=6, tuning=x)) for x in (None, Tuning("lora", rank=4), Tuning("state")))
    width, size = 64, 16
    assert state.trained == 6 * width * size and state.parameters == full.parameters + state.trained
    assert lora.trained == lora.parameters - full.parameters == 6 * 4 * (8 * width + 2 * (width + 4 * width))
    assert lora.phases["step"]["optimizer"] < full.phases["step"]["optimizer"] / 5
    frozen = measure(job(layers=6, parts=(Part("blocks.1.*", train=False),)))
    some = full.trained - frozen.trained
    assert some == sum(p.numel() for p in job(layers=6).outline().blocks[1].parameters())
