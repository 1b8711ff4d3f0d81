"""Law 6: every backend equals the definition; laws 1-4 for the op alone."""

import pytest
import torch
from tiny import worst
from torch.library import opcheck

from infctx.ops import BACKENDS, wkv7

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65]
PACKED = [5, 0, 35, 1, 99, 64, 0]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty gives NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(b, t, h=3, n=16, dtype=torch.float64, sequences=None, lowest=-0.6065, seed=0):
    g = torch.Generator().manual_seed(seed)
    r, k, v, w, kk, rate = (torch.randn(b, t, h, n, generator=g, dtype=torch.float64) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    state = torch.randn(sequences or b, h, n, n, generator=g, dtype=torch.float64)
    tensors = [r, lowest * torch.sigmoid(3 * w), k, v, -kk, kk * torch.sigmoid(rate)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype).requires_grad_() for x in tensors] + [state.to(wide).requires_grad_()]


def transcription(r, w, k, v, a, b, state, cu_seqlens=None):
    """The recurrence as the paper has it, with einsum, differentiated by autograd."""
    rows, states = [], []
    borders = [(i, 0, r.shape[1], i) for i in range(r.shape[0])]
    if cu_seqlens is not None:
        borders = [(0, int(x), int(y), i) for i, (x, y) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:]))]
    for row, begin, end, i in borders:
        s, ys = state[i], []
        for t in range(begin, end):
            move = torch.diag_embed(w[row, t].exp()) + torch.einsum("hi,hj->hij", a[row, t], b[row, t])
            s = torch.einsum("hvk,hkj->hvj", s, move) + torch.einsum("hv,hk->hvk", v[row, t], k[row, t])
            ys.append(torch.einsum("hvk,hk->hv", s, r[row, t]))
        rows.append(torch.stack(ys) if ys else v[row, :0])
        states.append(s)
    y = torch.stack(rows) if cu_seqlens is None else torch.cat(rows).unsqueeze(0)
    return y, torch.stack(states)


def everything(function, args, **options):
    """Outputs and all gradients, with a loss on both outputs."""
    y, state = function(*args, **options)
    weights = [
        torch.linspace(-1, 2, max(1, x.numel()), dtype=torch.float64)[: x.numel()].view(x.shape) for x in (y, state)
    ]
    grads = torch.autograd.grad(
        [y, state], args, [x.to(o.dtype) for x, o in zip(weights, (y, state))], allow_unused=True
    )
    return [y, state, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, args))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_backend_equals_transcription(backend, length):
    args = inputs(2, length)
    assert worst(everything(wkv7, args, backend=backend), everything(transcription, args)) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_packed_sequences_of_every_head_size(backend, size):
    cu = torch.tensor([0, *PACKED]).cumsum(0).int()
    args = inputs(1, int(cu[-1]), h=2, n=size, sequences=len(PACKED))
    options = {"cu_seqlens": cu}
    assert worst(everything(wkv7, args, backend=backend, **options), everything(transcription, args, **options)) < 1e-13


def test_chunked_equals_reference_on_a_thousand_tokens():
    args = inputs(2, 1000, h=2)
    assert worst(everything(wkv7, args, backend="chunked"), everything(wkv7, args, backend="reference")) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_low_precision_inputs_keep_a_float32_state(backend, dtype, bound):
    low = inputs(2, 130, n=64, dtype=dtype)
    y, state = wkv7(*low, backend=backend)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in low]
    assert worst(everything(wkv7, low, backend=backend), everything(transcription, exact)) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_have_the_bits_they_have_alone(backend):
    cu = torch.tensor([0, *PACKED]).cumsum(0).int()
    args = inputs(1, int(cu[-1]), dtype=torch.float32, sequences=len(PACKED))
    y, state = wkv7(*args, cu_seqlens=cu, backend=backend)
    dy, ds = torch.randn_like(y), torch.randn_like(state)
    grads = torch.autograd.grad([y, state], args, [dy, ds])
    for i, (begin, end) in enumerate(zip(cu[:-1], cu[1:])):
        alone = [x[:, begin:end].detach().requires_grad_() for x in args[:6]]
        alone.append(args[6][i : i + 1].detach().requires_grad_())
        y1, s1 = wkv7(*alone, backend=backend)
        g1 = torch.autograd.grad([y1, s1], alone, [dy[:, begin:end], ds[i : i + 1]])
        packed = [y[:, begin:end], state[i : i + 1], *(g[:, begin:end] for g in grads[:6]), grads[6][i : i + 1]]
        assert all(torch.equal(x, z) for x, z in zip([y1, s1, *g1], packed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_near_zero_and_near_one(backend):
    for lowest in (-1e-7, -4.9, -80.0):  # the last is outside RWKV-7's range: tiles would overflow
        args = inputs(2, 70, lowest=lowest)
        assert worst(everything(wkv7, args, backend=backend), everything(transcription, args)) < 1e-12


def test_equal_keys_that_are_overwritten_again_and_again():
    """The worst case of the triangular system: powers of it grow, its inverse does not."""
    args = inputs(1, 64, h=1, n=32, dtype=torch.float32)
    kk = torch.nn.functional.normalize(torch.ones(1, 64, 1, 32), dim=-1)
    args[4], args[5], args[1] = (
        (-kk).requires_grad_(),
        kk.clone().requires_grad_(),
        torch.zeros_like(kk).requires_grad_(),
    )
    exact = [x.detach().double().requires_grad_() for x in args]
    assert worst(everything(wkv7, args, backend="chunked"), everything(transcription, exact)) < 5e-6


def test_reference_gradient_by_finite_differences():
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, backend="reference"), inputs(2, 5, h=2, n=4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_declared_as_torch_wants_it(backend, packed):
    args = inputs(1 if packed else 2, 20, dtype=torch.float32, sequences=2)
    cu = torch.tensor([0, 9, 20]) if packed else None
    assert set(opcheck(torch.ops.infctx.wkv7.default, (*args, cu, backend)).values()) == {"SUCCESS"}


def test_nothing_is_mutated():
    args = inputs(2, 40)
    before = [x.detach().clone() for x in args]
    everything(wkv7, args)
    assert all(torch.equal(x, y) for x, y in zip(args, before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(2, a[2][:, :-1]), "must all be"),
        (lambda a: a.__setitem__(6, a[6][:1]), "state must be"),
        (lambda a: a.__setitem__(6, a[6].float()), "state must be torch.float64"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    args = inputs(2, 8)
    change(args)
    with pytest.raises(ValueError, match=message):
        wkv7(*args)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="choose one of: auto, reference, chunked"):
        wkv7(*inputs(1, 8), backend="fast")
