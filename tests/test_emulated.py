"""Law 6 without a GPU: the CUDA sources, compiled as host C++ with threads as fibers, against the float64 definition.

Shared memory is poisoned, and threads run in several orders that must give the same bits.
"""

import ctypes
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recurrences import CONSTANTS, OPS, PACKED, everything, expected, inputs
from tiny import worst

from infctx.ops import BACKENDS
from infctx.ops.build import build_emulated
from infctx.ops.cuda import TENSOR, Cuda
from infctx.ops.native import WIDE

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
RECURRENT = [(name, "recurrent", dtype) for name in OPS for dtype in BOUNDS]
TENSORS = [(name, "tensor", dtype) for name in TENSOR for dtype in (torch.bfloat16, torch.float16)]
PIECES = [(name, "pieces", dtype) for name in OPS for dtype in (torch.float32, torch.bfloat16)]
ORDERS = [(0, 0), (1, 0), (2, 1), (2, 2)]  # forward, reverse, shuffled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the CUDA sources with")
kernels = pytest.mark.parametrize(("name", "form", "dtype"), RECURRENT + TENSORS + PIECES)


@pytest.fixture(scope="module", autouse=True)
def emulator(tmp_path_factory, worker_id):
    """The emulated library as backends named after the forms of the CUDA backend."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    path = build_emulated(shared / "emulated")
    library = ctypes.CDLL(str(path))
    library.emulator_threads(1)  # idle threads of its own would take time from other tests
    for form in ("recurrent", "tensor", "pieces"):
        BACKENDS[form] = Cuda(form, build=lambda: path, multiprocessors=lambda: 132)
    yield library
    for form in ("recurrent", "tensor", "pieces"):
        del BACKENDS[form]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(name, form, dtype, b=2, t=65, h=2, **options):
    """Inputs as models give them: log decays, and what all tokens share, in float32."""
    args = inputs(name, b, t, h=h, n=options.pop("n", 64 if form == "tensor" else 16), dtype=dtype, **options)
    for i in WIDE[name]:
        args[i] = args[i].detach().float().requires_grad_()
    return args


def error(name, form, args, **options):
    """The worst relative error of outputs and gradients against float64 on the same rounded inputs."""
    exact = [x.detach().double().requires_grad_() for x in args]
    return worst(everything(OPS[name], args, backend=form, **options), expected(name, exact, **options))


def bound(name, form, dtype):
    return BOUNDS[dtype] * (6 if name == "wkv4" else 1)  # exponents are sums of as many roundings as there are tokens


@kernels
@pytest.mark.parametrize("length", LENGTHS)
def test_kernel_equals_definition(name, form, dtype, length):
    assert error(name, form, case(name, form, dtype, t=length)) < bound(name, form, dtype)


@kernels
def test_packed_sequences(name, form, dtype):
    cu = torch.tensor([0, *PACKED]).cumsum(0).int()
    args = case(name, form, dtype, b=1, t=int(cu[-1]), sequences=len(PACKED))
    assert error(name, form, args, cu_seqlens=cu) < bound(name, form, dtype)


@kernels
def test_a_thousand_tokens(name, form, dtype):
    assert error(name, form, case(name, form, dtype, b=1, t=1000)) < bound(name, form, dtype)


@kernels
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_head_sizes(name, form, dtype, size):
    assert error(name, form, case(name, form, dtype, t=35, n=size)) < bound(name, form, dtype)


@kernels
@pytest.mark.parametrize("lowest", [-1e-7, -0.6065, -18.42, -80.0, -1e4])
def test_decays(name, form, dtype, lowest):
    """Forgetting nothing, and everything; RWKV-7's own log decays end at -0.6065."""
    if name == "wkv7" and form != "recurrent" and dtype != torch.float32 and lowest < -0.6065:
        pytest.skip("outside the range of the tensor-core kernel: test_too_much_decay")
    # With almost nothing carried, the gradient of w is a few products of what dy was rounded to.
    slack = 2 if lowest == -1e4 else 1
    assert error(name, form, case(name, form, dtype, t=70, lowest=lowest)) < slack * bound(name, form, dtype)


@pytest.mark.parametrize("form", ["tensor", "pieces"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, -1.25), (torch.bfloat16, -4.4)])
def test_too_much_decay(form, dtype, least):
    """Down to `least` the tensor-core kernel is exact; further down it says NaN, up to the end of the piece."""
    bounded = case("wkv7", form, dtype, t=70, n=64, lowest=least)
    assert error("wkv7", form, bounded) < bound("wkv7", form, dtype)
    w = bounded[1].detach().clone()
    w[:, 40] = 1.2 * least
    y, state, *grads = everything(OPS["wkv7"], [bounded[0], w.requires_grad_(), *bounded[2:]], backend=form)
    assert y[:, :32].isfinite().all() and y[:, 40:48].isnan().all()
    assert form == "pieces" or (y[:, 48:].isnan().all() and state.isnan().all())
    assert all(x.isnan().any() for x in grads)


@pytest.mark.parametrize(("form", "dtype"), [("recurrent", torch.float32), ("tensor", torch.bfloat16)])
def test_decays_of_all_sizes_in_one_chunk(form, dtype):
    """1e-8 and 1 - 1e-7 beside each other: exponents that are differences would lose their digits."""
    args = case("wkv6", form, dtype, t=70)
    strong = torch.rand(args[3].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    args[3] = torch.where(strong, -18.42, -1e-7).requires_grad_()
    assert error("wkv6", form, args) < bound("wkv6", form, dtype)


@kernels
def test_any_order_of_threads_gives_the_same_bits(name, form, dtype, emulator):
    """A missing barrier would show."""
    cu = torch.tensor([0, 33, 33, 70, 71])
    args = case(name, form, dtype, b=1, t=71, sequences=4)
    found = []
    for order, seed in ORDERS:
        emulator.emulator_order(order, ctypes.c_uint64(seed))
        found.append(everything(OPS[name], args, backend=form, cu_seqlens=cu))
    emulator.emulator_order(0, ctypes.c_uint64(0))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


@pytest.mark.parametrize(("name", "form", "dtype"), RECURRENT + TENSORS)
def test_packed_documents_have_the_bits_they_have_alone(name, form, dtype):
    args = case(name, form, dtype, b=1, t=70, sequences=3)
    borders = [0, 33, 33, 70]
    y, last = OPS[name](*args, cu_seqlens=torch.tensor(borders), backend=form)
    for i, (begin, end) in enumerate(zip(borders, borders[1:])):
        own = [x if j in CONSTANTS[name] else x[:, begin:end] for j, x in enumerate(args[:-1])]
        y1, last1 = OPS[name](*own, args[-1][i : i + 1], backend=form)
        assert torch.equal(y1, y[:, begin:end]) and torch.equal(last1[0], last[i])


@pytest.mark.parametrize("form", ["recurrent", "tensor"])
def test_borders_that_do_not_fit_end_the_process(form, emulator):
    """On a GPU nothing waits to look at them: the kernel refuses."""
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]; from pathlib import Path; import recurrences as r\n"
        "from infctx.ops.cuda import Cuda\n"
        "args = [x.detach() for x in r.inputs('wkv7', 1, 40, n=64, dtype=torch.bfloat16, sequences=2)]\n"
        f"kernel = Cuda('{form}', lambda: Path(sys.argv[1]), lambda: 132)\n"
        "kernel.forward('wkv7', tuple(args[:-1]), args[-1], torch.tensor([0, 50, 40]), False)"
    )
    command = [sys.executable, "-c", script, emulator._name, str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT and "trap" in done.stderr.lower()


def test_float64_and_other_sizes_are_refused():
    with pytest.raises(ValueError, match="float32: choose kernel reference or chunked"):
        OPS["wkv7"](*inputs("wkv7", 1, 4), backend="recurrent")
    with pytest.raises(RuntimeError, match="no kernel for head size 48"):
        OPS["wkv7"](*inputs("wkv7", 1, 4, n=48, dtype=torch.float32), backend="recurrent")
    with pytest.raises(ValueError, match=r"no tensor-core kernel of wkv7 for head size 64 in torch\.float32"):
        OPS["wkv7"](*inputs("wkv7", 1, 4, n=64, dtype=torch.float32), backend="tensor")
