"""The backend of flash-linear-attention: our side of it by a stand-in, its kernels by the interpreter of Triton."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from recurrences import OPS, PACKED, everything, expected, inputs
from tiny import worst

from infctx.ops import fla, reference
from infctx.ops.backends import BACKENDS, available, choose

NAMES = ("wkv6", "wkv7")


class Function(torch.autograd.Function):
    """A recurrence as the package has it: states (key, value) and a gradient of its own."""

    @staticmethod
    def forward(ctx, name, state, cu_seqlens, *tensors):
        ctx.name, ctx.lengths = name, [tensors[0].shape[1]] * len(state)
        if cu_seqlens is not None:
            ctx.lengths = cu_seqlens.diff().tolist()
        ctx.save_for_backward(state, *tensors)
        y, last = getattr(reference, f"{name}_forward")(flat(tensors), state.mT.double(), ctx.lengths)
        return y.view(tensors[1].shape).to(tensors[0]), last.mT.to(state).contiguous()

    @staticmethod
    def backward(ctx, dy, dstate):
        state, *tensors = ctx.saved_tensors
        given = (flat(tensors), state.mT.double(), dy.flatten(0, 1).double(), dstate.mT.double(), ctx.lengths)
        *grads, first = getattr(reference, f"{ctx.name}_backward")(*given)
        grads = [g.view(x.shape).to(x) for g, x in zip(grads, tensors)]
        return None, first.mT.to(state), None, *grads


def flat(tensors):
    return tuple(x.double() if x.dim() == 2 else x.flatten(0, 1).double() for x in tensors)


@pytest.fixture
def calls(monkeypatch):
    """The package's two functions in its place, and what was given to them."""
    seen = []

    def run(name, tensors, state, cu_seqlens, **others):
        seen.append(others | {"precision": knobs.language.fp32_default})
        assert all(x.is_contiguous() for x in (*tensors, state))
        assert cu_seqlens is None or (cu_seqlens.dtype == torch.int64 and len(tensors[0]) == 1)
        assert state.dtype == torch.float32 and len(state) == (len(tensors[0]) if cu_seqlens is None else len(PACKED))
        wide = [i for i, x in enumerate(tensors) if x.dtype != tensors[0].dtype]
        assert wide == [] or tuple(wide) == fla.native.WIDE[name]
        assert tensors[fla.DECAY[name]].min() >= fla.ZERO
        return Function.apply(name, state, cu_seqlens, *tensors)

    def chunk_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens, chunk_size):
        assert (scale, output_final_state) == (1.0, True)
        return run("wkv6", (r, k, v, w, u), initial_state, cu_seqlens, chunk_size=chunk_size)

    def chunk_rwkv7(
        r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens, safe_gate, chunk_size,
        disable_recompute, lower_bound,
    ):  # fmt: skip
        assert (scale, output_final_state, safe_gate, lower_bound) == (1.0, True, False, None)
        return run("wkv7", (r, w, k, v, a, b), initial_state, cu_seqlens, chunk_size=chunk_size)

    language = Language()
    knobs = make_module("triton.knobs", language=language)
    monkeypatch.setitem(sys.modules, "triton", make_module("triton", knobs=knobs))
    for name, function in (("rwkv6", chunk_rwkv6), ("rwkv7", chunk_rwkv7)):
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", make_module(name, **{function.__name__: function}))
    monkeypatch.setitem(sys.modules, "fla", make_module("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", make_module("fla.ops"))
    monkeypatch.setattr(fla, "missing", lambda device: None)
    return seen


class Language:
    """Triton's settings of its language, with their scope."""

    fp32_default = None

    def scope(self):
        return self

    def __enter__(self):
        pass

    def __exit__(self, *error):
        self.fp32_default = None


def make_module(name, **names):
    module = ModuleType(name)
    vars(module).update(names)
    return module


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 1, 33])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_layout_and_gradients(calls, name, length, dtype, bound):
    args = inputs(name, 2, length, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in args]
    assert worst(everything(OPS[name], args, backend="fla"), expected(name, exact)) < bound
    tile = {"wkv6": 16 if dtype == torch.float32 else 64, "wkv7": 16}[name]
    precision = "ieee" if dtype == torch.float32 else None
    assert calls == [{"chunk_size": tile, "precision": precision}] * (2 if length else 0)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences(calls, name):
    cu = torch.tensor([0, *PACKED]).cumsum(0).int()
    args = inputs(name, 1, int(cu[-1]), dtype=torch.float32, sequences=len(PACKED))
    exact = [x.detach().double().requires_grad_() for x in args]
    options = {"cu_seqlens": cu}
    assert worst(everything(OPS[name], args, backend="fla", **options), expected(name, exact, **options)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_beyond_what_it_computes(calls, name, dtype):
    """In float32 the portable backend takes over; 16 bits ask for no more than that nothing overflows."""
    args = inputs(name, 2, 33, dtype=dtype, lowest=-1e4)
    args[fla.DECAY[name]] = args[fla.DECAY[name]].detach().float().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in args]
    assert worst(everything(OPS[name], args, backend="fla"), expected(name, exact)) < (2e-6, 6e-3)[dtype.itemsize == 2]
    assert bool(calls) == (dtype == torch.bfloat16)


def test_what_it_has_not_is_refused(calls):
    with pytest.raises(ValueError, match="no RWKV-4: choose auto or chunked"):
        OPS["wkv4"](*inputs("wkv4", 1, 8, dtype=torch.float32), backend="fla")
    with pytest.raises(ValueError, match="no float64"):
        OPS["wkv7"](*inputs("wkv7", 1, 8), backend="fla")


def test_where_it_can_not_run_it_says_what_to_do(monkeypatch):
    assert "fla" in BACKENDS and "fla" not in available("cpu")
    with pytest.raises(ValueError, match="kernel 'fla' does not run on cpu: choose auto"):
        choose("fla", "cpu")
    installed = {}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(fla.metadata, "version", version)
    monkeypatch.setattr(fla, "find_spec", installed.get)
    missing = fla.missing.__wrapped__
    assert missing("cuda").endswith("is not installed: pip install flash-linear-attention")
    installed["fla-core"] = "0.5.2"
    assert missing("cuda") == "needs fla-core 0.6 or later, found 0.5.2: pip install -U flash-linear-attention"
    installed["fla-core"] = "0.6.0"
    assert missing("cuda").startswith("needs triton")
    installed["triton"] = "a spec"
    assert missing("cuda") is None


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """Every length, packed sequences, float32 and float16, against the papers' formulas in float64."""
    missing = [name for name in ("triton", "fla") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install flash-linear-attention triton")
    script = Path(__file__).parent / "fla_interpreted.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith(" cases\n")
