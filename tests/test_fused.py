"""What is fused around the recurrences equals its plain form and that one's gradients, on the CPU and emulated."""

import ctypes
import shutil
from typing import NamedTuple

import pytest
import torch
from tiny import worst
from torch.library import opcheck

from infctx.ops import fused, fused_ops, native
from infctx.ops.build import build_emulated

BORDERS = torch.tensor([0, 5, 5, 6, 41, 140, 140])
OPS = ("shift_mix", "moved_mix", "relu_squared", "rwkv7_prepare", "first_prepare", "rwkv7_output", "rwkv6_output")
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
ORDERS = [(0, 0), (1, 0), (2, 1), (2, 2)]  # of the emulator's threads: forward, reverse, shuffled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory, worker_id):
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    library = native.Library(build_emulated(shared / "emulated"))
    library.library.emulator_threads(1)
    return library


@pytest.fixture(params=["cpu", "emulated"])
def library(request, monkeypatch):
    if request.param == "emulated":
        emulated = request.getfixturevalue("emulator")
        monkeypatch.setattr(fused_ops, "_library", lambda device: emulated)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty gives NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case(NamedTuple):
    function: object  # of (form, dtype, *tensors), gives a list of tensors
    tensors: list
    wide: tuple = ()  # which of them are never in 16 bits


def case(op, b=2, t=70, heads=2, n=16, mixes=6, borders=None, seed=0):
    """Float64 inputs that nothing in is zero or symmetric."""
    g, c = torch.Generator().manual_seed(seed), heads * n

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    tokens, parameter, by_head = (b, t, c), (1, 1, c), (b, t, heads, n)
    packing = None if borders is None else fused.pack_sequences(borders, t)

    def shift(form, dtype, x, carried, *rest):
        moved, rest = (rest[0], rest[1:]) if op == "moved_mix" else (None, rest)
        y, last = fused.shift_mix(x, carried, rest, packing, dtype, moved, form)
        return [*y, last]

    def prepare(form, dtype, wl, al, k, v, w0, a0, k_k, k_a, *rest):
        residual = fused.Residual(*rest) if rest else None
        return list(fused.rwkv7_prepare(wl, al, k, v, w0, a0, k_k, k_a, heads, dtype, residual, form))

    if op in ("shift_mix", "moved_mix"):
        moved = [random(mixes, *tokens)] if op == "moved_mix" else []
        given = [random(*tokens), random(b if borders is None else len(borders) - 1, c), *moved]
        wide = range(2 + len(moved), 2 + len(moved) + mixes)
        return Case(shift, given + [random(*parameter) for _ in range(mixes)], (1, *wide))
    if op == "relu_squared":
        return Case(lambda form, dtype, x: [fused.relu_squared(x, form)], [random(*tokens)])
    if op in ("rwkv7_prepare", "first_prepare"):
        given = [random(*tokens) for _ in range(4)] + [random(*parameter) for _ in range(4)]
        mixed = [random(*tokens), random(*parameter), random(*tokens)] if op == "rwkv7_prepare" else []
        return Case(prepare, given + mixed, (4, 5, 6, 7, 9))
    norm = [random(*tokens), random(c), random(c)]
    if op == "rwkv6_output":
        return Case(lambda form, dtype, *x: [fused.rwkv6_output(*x, dtype, form)], [random(*by_head), *norm], (2, 3))
    given = [random(*by_head) for _ in range(4)] + norm + [random(heads, n)]
    return Case(lambda form, dtype, *x: [fused.rwkv7_output(*x, dtype, form)], given, (5, 6, 7))


def weights(outputs):
    """Of a loss on all outputs; numbers that every dtype has."""
    return [((torch.arange(x.numel()) * 7 % 31 - 11) / 8).view_as(x).to(x.dtype) for x in outputs]


def everything(one, form, tensors, dtype=None):
    """Outputs, in the first input's dtype unless another is given, and all gradients."""
    outputs = one.function(form, dtype or tensors[0].dtype, *tensors)
    return [*outputs, *torch.autograd.grad(outputs, tensors, weights(outputs))]


def rounded(one, dtype):
    """The inputs in a dtype, those that never are in 16 bits in float32 then."""
    wide = torch.promote_types(dtype, torch.float32)
    return [x.detach().to(wide if i in one.wide else dtype).requires_grad_() for i, x in enumerate(one.tensors)]


def error(one, dtype, out=None):
    """The worst relative error of outputs and gradients against the plain form in float64 on the same inputs."""
    given = rounded(one, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    return worst(everything(one, "compiled", given, out), everything(one, "plain", exact))


def dtypes(library):
    return [torch.float32, torch.bfloat16, torch.float64 if library == "cpu" else torch.float16]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("t", [0, 1, 31, 32, 33, 70])
def test_equals_plain_form(op, t, library):
    for dtype in dtypes(library):
        assert error(case(op, t=t), dtype) < BOUNDS[dtype], dtype


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("heads", "n"), [(1, 40), (3, 16), (1, 48), (5, 12), (4, 64), (3, 128), (20, 32)])
def test_widths(op, heads, n, library):
    if library == "emulated" and n not in (16, 32, 64, 128) and "mix" not in op and op != "relu_squared":
        pytest.skip("no such head size on a GPU")
    assert error(case(op, t=37, heads=heads, n=n), torch.float32) < 1e-6
    if library == "cpu":
        assert error(case(op, t=37, heads=heads, n=n), torch.float64) < 1e-13


@pytest.mark.parametrize("op", ["shift_mix", "moved_mix"])
@pytest.mark.parametrize("mixes", [1, 2, 3, 4, 5, 6])
def test_packed_sequences(op, mixes, library):
    """Some of them without a token, or with one; each with a state, and a gradient on the one it leaves behind."""
    one = case(op, 1, 140, n=20, mixes=mixes, borders=BORDERS)
    for dtype in dtypes(library):
        assert error(one, dtype) < BOUNDS[dtype], dtype


def test_packed_sequences_have_the_bits_they_have_alone(library):
    one = case("shift_mix", 1, 140, borders=BORDERS)
    x, carried, *mixes = rounded(one, torch.float32)
    together = everything(one, "compiled", [x, carried, *mixes])
    for s, (begin, end) in enumerate(zip(BORDERS[:-1], BORDERS[1:])):
        own = [x[:, begin:end].detach().requires_grad_(), carried[s : s + 1].detach().requires_grad_()]
        y, last = fused.shift_mix(*own, mixes, None, x.dtype, form="compiled")
        assert all(torch.equal(a, b[:, begin:end]) for a, b in zip(y, together)) and torch.equal(
            last[0], together[6][s]
        )
        *dy, dlast = weights(together[:7])
        dx, dcarried = torch.autograd.grad([*y, last], own, [*(w[:, begin:end] for w in dy), dlast[s : s + 1]])
        assert torch.equal(dx, together[7][:, begin:end]) and torch.equal(dcarried[0], together[8][s])


@pytest.mark.parametrize("op", OPS)
def test_any_number_or_order_of_threads_gives_the_same_bits(op, library, request):
    one, found = case(op, t=300, heads=4, n=64), []
    given = rounded(one, torch.float32)
    for i in range(3 if library == "cpu" else len(ORDERS)):
        if library == "cpu":
            torch.set_num_threads(i + 1)
        else:
            order, seed = ORDERS[i]
            request.getfixturevalue("emulator").library.emulator_order(order, ctypes.c_uint64(seed))
        found.append(everything(one, "compiled", given))
    if library == "cpu":
        torch.set_num_threads(1)
    else:
        request.getfixturevalue("emulator").library.emulator_order(0, ctypes.c_uint64(0))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other))


@pytest.mark.parametrize("op", [op for op in OPS if op != "relu_squared"])  # which has one input
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_mixed_precision(op, out, library):
    """16-bit tokens beside float32 ones, as autocast gives them: what is asked for in float32 was never rounded."""
    one = case(op)
    given = rounded(one, torch.bfloat16)
    given[0] = given[0].detach().float().requires_grad_()  # x of the norm before; y of the recurrence
    outputs = one.function("compiled", out, *given)
    exact = one.function("plain", torch.float64, *(x.detach().double() for x in given))
    skipped = 2 if op == "first_prepare" else None  # v goes through
    for i, (x, y) in enumerate(zip(outputs, exact)):
        low = x.dtype == torch.bfloat16 or i == skipped
        assert worst([x], [y]) < (6e-3 if low else 1e-6), (i, x.dtype)
    assert error(one, torch.bfloat16, out) < 6e-3


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["float32", "mixed", "bfloat16"])
def test_plain_and_compiled_have_the_same_dtypes(op, out, model):
    one = case(op, t=3)
    given = rounded(one, torch.float32 if model == "float32" else torch.bfloat16)
    if model == "bfloat16":
        states = (1,) if "mix" in op else (0,) if "output" in op else ()
        given = [x if i in states else x.detach().bfloat16().requires_grad_() for i, x in enumerate(given)]
    plain, ours = (everything(one, form, given, out) for form in ("plain", "compiled"))
    assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in plain]
    assert worst(ours, plain) < 0.05


def test_values_at_the_ends(library):
    """Sigmoids without a slope, keys of zero, and a head without variance."""
    one = case("rwkv7_prepare", t=4)
    given = rounded(one, torch.float32)
    with torch.no_grad():
        given[0][:, 0], given[0][:, 1], given[1][:, 0], given[1][:, 1] = 200, -200, 200, -200
        given[2][:, 2] = 0
    exact = [x.detach().double().requires_grad_() for x in given]
    ours, plain = everything(one, "compiled", given), everything(one, "plain", exact)
    assert worst(ours, plain) < 1e-6 and all(x.isfinite().all() for x in ours)
    one = case("rwkv7_output", t=4)
    given = rounded(one, torch.float32)
    with torch.no_grad():
        given[0][:] = 3
    exact = [x.detach().double().requires_grad_() for x in given]
    assert worst(everything(one, "compiled", given), everything(one, "plain", exact)) < 1e-6


def test_long_sums_keep_their_digits(library):
    """The gradient of a parameter over many tokens of one sign."""
    t = 20000 if library == "cpu" else 3000
    x, carried = torch.zeros(1, t, 16), torch.ones(1, 16)
    x[:, 1::2] = 1
    mix = torch.full((16,), 0.1, requires_grad=True)
    (y,), _ = fused.shift_mix(x, carried, [mix], None, x.dtype, form="compiled")
    dy = torch.rand(t, generator=torch.Generator().manual_seed(0)).view(1, t, 1) * (1 - 2 * x[..., :1])
    (grad,) = torch.autograd.grad(y, mix, dy.expand_as(y))
    assert worst([grad], [dy.abs().double().sum().expand(16)]) < 2e-7


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, monkeypatch):
    """The declarations to torch: schema, fake results, gradient, tracing."""
    calls, run = [], fused_ops.run
    monkeypatch.setattr(fused, "run", lambda *args: calls.append(args) or run(*args))
    one = case(op, t=5)
    one.function("compiled", torch.float32, *rounded(one, torch.float32))
    ((name, tensors, heads, size, dtype, *borders),) = calls
    arguments = (list(tensors), borders[0] if borders else None, heads, size, dtype)
    found = opcheck(getattr(torch.ops.infctx, name).default, arguments)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS)
def test_traced_without_a_break(op):
    one = case(op, t=5)
    given = rounded(one, torch.float32)

    def eager(*tensors):
        return one.function("compiled", torch.float32, *tensors)

    traced = torch.compile(eager, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(sum(x.square().sum() for x in f(*given)), given) for f in (traced, eager)]
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_forms(monkeypatch):
    x = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="one of: auto, plain, compiled"):
        fused.relu_squared(x, "fast")
    with pytest.raises(RuntimeError, match="no kernel"):
        fused.relu_squared(x.half(), "compiled")
    assert torch.equal(fused.relu_squared(x.half()), torch.relu(x.half()) ** 2)  # auto: not on a CPU

    def missing(device):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(fused_ops, "_library", missing)
    fused_ops._available.cache_clear()
    assert torch.equal(fused.relu_squared(x), torch.relu(x) ** 2)
    fused_ops._available.cache_clear()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        fused.relu_squared(x, "compiled")
