"""The emulator of CUDA threads: right kernels give what torch gives, in every order; wrong ones are found out."""

import ctypes
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "emulated.cu"
ORDERS = [(0, 0), (1, 0), *((2, seed) for seed in range(4))]
FORMATS = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fopenmp", "-fno-strict-aliasing", "-fPIC", "-shared"]
    command = ["g++", "-x", "c++", *flags, f"-I{ROOT / 'cuda'}", SOURCE, "-o", path]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0 and "warning" not in made.stderr, made.stderr
    return path


@pytest.fixture
def kernels(built):
    library = ctypes.CDLL(str(built))
    library.emulator_threads(1)
    set_order(library, ORDERS[0])
    return library


def set_order(kernels, order):
    kernels.emulator_order(order[0], ctypes.c_uint64(order[1]))


def call(function, *arguments):
    assert function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments)) == 0


def small_integers(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def multiply(kernels, a, b, layout=0):
    memory, c = b.T.contiguous() if layout == 2 else b, torch.full((len(a), b.shape[1]), torch.nan)
    call(kernels.run_product, int(a.dtype == torch.float16), layout, c, a, memory, *c.shape, len(b))
    return c


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", range(4), ids=["x4_trans", "x2_trans", "x2", "no_ldmatrix"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_product(kernels, dtype, layout, order):
    """Sums of small integers are exact, whatever their order."""
    set_order(kernels, order)
    a, b = small_integers(48, 80), small_integers(80, 32, seed=1)
    assert torch.equal(multiply(kernels, a.to(dtype), b.to(dtype), layout), a @ b)


@pytest.mark.parametrize("dtype", FORMATS)
def test_product_rounds_nothing_but_its_sums(kernels, dtype):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((32, 256), (256, 32)))
    assert (multiply(kernels, a, b).double() - a.double() @ b.double()).abs().max() < 3e-5


def test_product_tf32(kernels):
    a, b, c = small_integers(16, 8) * 100, small_integers(8, 8, seed=1) + 2**-6, torch.full((16, 8), torch.nan)
    call(kernels.run_product_tf32, c, a, b)
    assert torch.equal(c, a @ b)
    ties = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-20, -1 - 2**-11, 1 + 2**-10, 3e38, 1e-37, 0, 1 + 3 * 2**-11])
    call(kernels.run_product_tf32, c, ties.expand(16, 8).contiguous(), torch.eye(8))
    rounded = ((ties.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    assert torch.equal(c, rounded.expand(16, 8))
    assert rounded[:4].tolist() == [1 + 2**-10, 1, -1 - 2**-10, 1 + 2**-10]
    call(kernels.run_product_tf32, c, torch.full((16, 8), -1, dtype=torch.int32), torch.ones(8, 8))
    assert c.isnan().all()


def test_transpose(kernels):
    x = torch.arange(64, dtype=torch.int16).view(8, 8)
    out = torch.zeros_like(x)
    call(kernels.run_transpose, out, x)
    assert torch.equal(out, x.T)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shuffles(kernels, dtype, order):
    set_order(kernels, order)
    x = torch.arange(96, dtype=dtype)
    out = torch.zeros(4, 96, dtype=dtype)
    call(kernels.run_shuffles, int(dtype == torch.float64), out, x, 96)
    lane, warp = torch.arange(96) % 32, torch.arange(96) // 32 * 32
    up, down = torch.where(lane < 2, lane, lane - 2), torch.where(lane > 28, lane, lane + 3)
    assert torch.equal(out, torch.stack([x[warp + i] for i in (torch.full_like(lane, 5), lane ^ 3, up, down)]))


def neighbourhood(dtype):
    """All finite values of a format, the midpoints between them, and the floats next to these."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    finite = patterns[patterns.isfinite()].double().unique()
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    infinity = torch.tensor(torch.inf)
    return torch.cat([patterns, middle, middle.nextafter(infinity), middle.nextafter(-infinity)])


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding(kernels, dtype):
    g = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (2**18,), generator=g).to(torch.int32).view(torch.float32)
    x = torch.cat([neighbourhood(dtype), torch.randn(2**16, generator=g), anything])
    x = x[: len(x) // 2 * 2]
    narrow, pairs, wide = torch.zeros_like(x, dtype=dtype), torch.zeros_like(x, dtype=dtype), torch.zeros_like(x)
    call(kernels.run_convert, int(dtype == torch.float16), narrow, pairs, wide, x, ctypes.c_int64(len(x) // 2))
    number = ~x.isnan()
    assert torch.equal(narrow[number].view(torch.int16), x[number].to(dtype).view(torch.int16))
    assert torch.equal(narrow.view(torch.int16), pairs.view(torch.int16)) and narrow[~number].isnan().all()
    assert torch.equal(wide[number].view(torch.int32), narrow[number].float().view(torch.int32))
    assert wide[~number].isnan().all()


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("in_flight", [2, -1])
def test_a_missing_wait_reads_old_data(kernels, in_flight, order):
    set_order(kernels, order)
    a, b, c = small_integers(16, 64).bfloat16(), small_integers(64, 16, seed=1).bfloat16(), torch.zeros(16, 16)
    call(kernels.run_hasty_product, in_flight, c, a, b, 16, 16, 64)
    assert c.isnan().all()


@pytest.mark.parametrize("which", range(3), ids=["block", "warp", "copy"])
def test_races_depend_on_the_order(kernels, which):
    x = torch.arange(128.0)
    results = {0: set(), 1: set()}
    for barrier, found in results.items():
        for order in ORDERS:
            set_order(kernels, order)
            out = torch.empty(64)
            call(kernels.run_exchange, which, barrier, out, x)
            found.add(tuple(out.nan_to_num(-1).tolist()))
    i = torch.arange(64.0)
    right = (63 - i, (i.long() ^ 1).float(), 63 - i + 100 * (127 - i))[which]
    assert results[1] == {tuple(right.tolist())} and len(results[0]) > 1


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_starts_as_nan(kernels, order):
    set_order(kernels, order)
    out = torch.zeros(5, 96)
    for _ in range(2):
        call(kernels.run_peek, out, 5, 96, 96 * 4)
        assert out.view(torch.int32).eq(-1).all() and out.isnan().all()


def test_limits_of_a_launch(kernels):
    peek = kernels.run_peek
    out = torch.zeros(1024)
    call(peek, out, 0, 1024, 4096)
    assert not out.any()
    call(peek, out, 1, 1024, 227 << 10)
    assert peek(None, 1, 1024, (227 << 10) + 1) == 1 and peek(None, 1, 1025, 4096) == 9


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_runs_once(kernels, threads, order):
    set_order(kernels, order)
    kernels.emulator_threads(threads)
    out = torch.zeros(3 * 2 * 5 * 4 * 3 * 7, dtype=torch.int32)
    call(kernels.run_place, out)
    assert torch.equal(out, torch.arange(len(out), dtype=torch.int32))


FAULTS = [
    "its block wrote outside the shared memory",
    "its block wrote outside the shared memory",
    r"waits in __syncthreads at \S+:\d+, but thread \(\d+, 0, 0\) waits in __syncthreads at \S+:\d+",
    r"waits in __syncthreads at \S+:\d+, but thread \(40, 0, 0\) has left the kernel",
    r"waits in __shfl_xor_sync at \S+:\d+, but thread \((7|39), 0, 0\) has left the kernel",
    r"__trap at \S+:\d+ was called",
    r"cp_async16 at \S+:\d+ has an address that is no multiple of 16 bytes",
    r"cp_async16 at \S+:\d+ has a source that is no multiple of 16 bytes",
    r"cp_async16 at \S+:\d+ has an address outside the shared memory",
    r"ldmatrix_x4 at \S+:\d+ has an address outside the shared memory",
    r"__syncwarp at \S+:\d+ has a mask of some lanes only",
    r"mma16816 at \S+:\d+ needs a warp of 32 lanes",
    r"waits in __shfl_xor_sync at \S+:\d+, but thread \(\d+, 0, 0\) waits in __shfl_sync",
]
RUN = """
import ctypes, resource, sys
path, which, order = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
kernels = ctypes.CDLL(path)
kernels.emulator_order(int(order), ctypes.c_uint64(5))
kernels.run_misuse(int(which), (ctypes.c_float * 64)())
"""


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_misuse_ends_the_process(built, which, order):
    command = [sys.executable, "-S", "-c", RUN, str(built), str(which), str(order)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT
    place = r"emulator: kernel misuse, block \([01], [012], 0\), thread \(\d+, 0, 0\): "
    assert re.fullmatch(f"({place}{FAULTS[which]}.*\n)+", ended.stderr), ended.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvcc_compiles_the_same_file(tmp_path, arch):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    command = ["nvcc", "-std=c++17", "-c", f"-arch={arch}", f"-I{ROOT / 'cuda'}", SOURCE, "-o", tmp_path / "object"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0 and "warning" not in made.stderr, made.stderr
