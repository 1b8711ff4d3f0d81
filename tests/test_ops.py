"""Law 6: every backend equals the definition; laws 1-4 for the ops alone."""

import pytest
import torch
from recurrences import CONSTANTS, OPS, PACKED, everything, expected, inputs, true_state
from tiny import worst
from torch.library import opcheck

from infctx.ops.backends import available

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65]

pytestmark = pytest.mark.parametrize("name", OPS)
backends = pytest.mark.parametrize("backend", available("cpu"))


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty gives NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@backends
@pytest.mark.parametrize("length", LENGTHS)
def test_backend_equals_transcription(name, backend, length):
    args = inputs(name, 2, length)
    assert worst(everything(OPS[name], args, backend=backend), expected(name, args)) < 1e-13


@backends
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_packed_sequences_of_every_head_size(name, backend, size):
    cu = torch.tensor([0, *PACKED]).cumsum(0).int()
    args = inputs(name, 1, int(cu[-1]), h=2, n=size, sequences=len(PACKED))
    options = {"cu_seqlens": cu}
    assert worst(everything(OPS[name], args, backend=backend, **options), expected(name, args, **options)) < 1e-13


def test_chunked_equals_reference_on_a_thousand_tokens(name):
    args = inputs(name, 2, 1000, h=2)
    assert (
        worst(everything(OPS[name], args, backend="chunked"), everything(OPS[name], args, backend="reference")) < 1e-12
    )


@backends
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_low_precision_inputs_keep_a_float32_state(name, backend, dtype, bound):
    low = inputs(name, 2, 130, n=64, dtype=dtype)
    for i in CONSTANTS[name]:  # their gradients are sums over all tokens, too large for float16
        low[i] = low[i].detach().float().requires_grad_()
    y, state = OPS[name](*low, backend=backend)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in low]
    slack = 6 if name == "wkv4" else 1  # its exponents are sums of as many roundings as there are tokens
    assert worst(everything(OPS[name], low, backend=backend), expected(name, exact)) < bound * slack


@backends
def test_packed_documents_have_the_bits_they_have_alone(name, backend):
    """The gradients of what all tokens share are sums over the documents: equal to rounding."""
    cu = torch.tensor([0, *PACKED]).cumsum(0).int()
    args = inputs(name, 1, int(cu[-1]), dtype=torch.float32, sequences=len(PACKED))
    y, state = OPS[name](*args, cu_seqlens=cu, backend=backend)
    dy, ds = torch.randn_like(y), torch.randn_like(state)
    grads = torch.autograd.grad([y, state], args, [dy, ds])
    tokens = [i for i in range(len(args) - 1) if i not in CONSTANTS[name]]
    sums = {i: torch.zeros_like(args[i]) for i in CONSTANTS[name]}
    for i, (begin, end) in enumerate(zip(cu[:-1], cu[1:])):
        alone = [x[:, begin:end] if j in tokens else x for j, x in enumerate(args[:-1])] + [args[-1][i : i + 1]]
        alone = [x.detach().requires_grad_() for x in alone]
        y1, s1 = OPS[name](*alone, backend=backend)
        g1 = torch.autograd.grad([y1, s1], alone, [dy[:, begin:end], ds[i : i + 1]])
        packed = [y[:, begin:end], state[i : i + 1], *(grads[j][:, begin:end] for j in tokens), grads[-1][i : i + 1]]
        assert all(torch.equal(x, z) for x, z in zip([y1, s1, *(g1[j] for j in tokens), g1[-1]], packed))
        for j in sums:
            sums[j] += g1[j]
    assert not sums or worst(sums.values(), [grads[j] for j in sums]) < 2e-6


@backends
@pytest.mark.parametrize("lowest", [-1e-7, -4.9, -18.42, -80.0, -1e4])
def test_decays_near_zero_and_near_one(name, backend, lowest):
    """For RWKV-7 what is below -5 is outside its range: tiles would overflow, and the reference takes over."""
    args = inputs(name, 2, 70, lowest=lowest)
    assert worst(everything(OPS[name], args, backend=backend), expected(name, args)) < 1e-12


@backends
def test_decays_of_all_sizes_in_one_tile_in_float32(name, backend):
    """Decays 1e-8 and 1 - 1e-7 beside each other: exponents that are differences would lose their digits."""
    args = inputs(name, 2, 70, dtype=torch.float32)
    at = {"wkv4": 0, "wkv6": 3, "wkv7": 1}[name]
    mixed = torch.where(torch.rand(args[at].shape, generator=torch.Generator().manual_seed(1)) < 0.3, -18.42, -1e-7)
    args[at] = mixed.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in args]
    assert worst(everything(OPS[name], args, backend=backend), expected(name, exact)) < 6e-6


def test_equal_keys_that_are_overwritten_again_and_again(name):
    """The worst case of the triangular system of RWKV-7: powers of it grow, its inverse does not."""
    args = inputs(name, 1, 64, h=1, n=32, dtype=torch.float32)
    if name == "wkv7":
        kk = torch.nn.functional.normalize(torch.ones(1, 64, 1, 32), dim=-1)
        args[4], args[5], args[1] = (x.clone().requires_grad_() for x in (-kk, kk, torch.zeros_like(kk)))
    exact = [x.detach().double().requires_grad_() for x in args]
    assert worst(everything(OPS[name], args, backend="chunked"), expected(name, exact)) < 5e-6


def test_reference_gradient_by_finite_differences(name):
    args = inputs(name, 2, 5, h=2, n=4)
    if name == "wkv4":  # its exponent has no gradient by definition
        exponent = args[-1][:, 2:].detach()
        args[-1] = args[-1][:, :2].detach().requires_grad_()

    def op(*x):
        state = torch.cat([x[-1], exponent], 1) if name == "wkv4" else x[-1]
        y, state = OPS[name](*x[:-1], state, backend="reference")
        # A difference quotient needs the exponent to move with what it scales.
        return y, state[:, :2] * state[:, 2:].exp() if name == "wkv4" else state

    if name == "wkv4":
        assert torch.autograd.gradcheck(lambda *x: op(*x)[0], args)
    else:
        assert torch.autograd.gradcheck(op, args)


@backends
@pytest.mark.parametrize("packed", [False, True])
def test_declared_as_torch_wants_it(name, backend, packed):
    # So few tokens that every saved state is used: the rest would be garbage, which opcheck compares.
    args = inputs(name, 1 if packed else 2, 15, dtype=torch.float32, sequences=2)
    cu = torch.tensor([0, 9, 15]) if packed else None
    op = getattr(torch.ops.infctx, name).default
    assert set(opcheck(op, (*args, cu, backend, True)).values()) == {"SUCCESS"}


def test_compiled_without_a_break(name):
    args = [x.detach() for x in inputs(name, 1, 40, dtype=torch.float32)]
    compiled = torch.compile(lambda *x: OPS[name](*x), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(*args), OPS[name](*args)))


def test_decays_of_nothing_left(name):
    """A log decay of -inf forgets everything."""
    args = [x.detach() for x in inputs(name, 1, 40)]
    at = {"wkv4": 0, "wkv6": 3, "wkv7": 1}[name]
    args[at] = torch.full_like(args[at], -torch.inf)
    pair = [OPS[name](*args, backend=backend) for backend in available("cpu")]
    assert all(x.isfinite().all() for out in pair for x in out[:1])
    assert worst([pair[0][0], true_state(pair[0][1])], [pair[1][0], true_state(pair[1][1])]) < 1e-12


def test_nothing_is_mutated(name):
    args = inputs(name, 2, 40)
    before = [x.detach().clone() for x in args]
    everything(OPS[name], args)
    assert all(torch.equal(x, y) for x, y in zip(args, before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(2, a[2][:, :-1]), "must all be"),
        (lambda a: a.__setitem__(-1, a[-1][:1]), "state must be"),
        (lambda a: a.__setitem__(-1, a[-1].float()), "state must be torch.float64"),
    ],
)
def test_wrong_shapes_are_refused(name, change, message):
    args = inputs(name, 2, 8)
    change(args)
    with pytest.raises(ValueError, match=message):
        OPS[name](*args)


def test_wrong_constants_are_refused(name):
    for at in CONSTANTS[name]:
        args = inputs(name, 2, 8)
        args[at] = args[at][:-1]
        with pytest.raises(ValueError, match="must be"):
            OPS[name](*args)


def test_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="choose one of: auto, reference, chunked"):
        OPS[name](*inputs(name, 1, 8), backend="fast")


def test_a_head_size_without_a_kernel(name, caplog):
    """Chosen automatically it is computed all the same, and said; asked for by name it is refused."""
    args = inputs(name, 2, 20, n=8)
    assert worst(everything(OPS[name], args), expected(name, args)) < 1e-13
    if name != "wkv4" and "cpu" in available("cpu"):
        with pytest.raises(RuntimeError, match="no kernel for head size 8"):
            OPS[name](*args, backend="cpu")
