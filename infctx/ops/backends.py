"""The backends of the recurrences, and which of them "auto" is."""

import logging
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from infctx.ops import chunked, cuda, fla, native, reference

log = logging.getLogger(__name__)


class Backend(Protocol):
    """What computes an op ("wkv4", "wkv6" or "wkv7").

    Inputs are (B, T, ...) or, if all tokens share them, (...). Sequences lie end to end over B and T, `borders`
    (sequences + 1,) int64 says where, on the inputs' device.
    """

    def saved(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> Any:
        """How many elements of the state's dtype forward keeps for backward."""

    def forward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        """Returns: y, the outgoing states, and what it keeps for backward, nothing unless `keep`."""

    def backward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, saved: Tensor, dy: Tensor, dstate: Tensor,
        borders: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Returns: the gradients of the inputs, and of the incoming states."""


class Portable:
    """A backend of torch operations, in the state's dtype, on flat tokens; backward starts from the inputs."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def saved(self, op: str, inputs: tuple[Tensor, ...], state: Tensor) -> int:
        """Nothing."""
        return 0

    def forward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, borders: Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        """As `Backend.forward`."""
        with torch.autocast(state.device.type, enabled=False):  # it would reach the backend's own matrix products
            y, last = getattr(self.module, f"{op}_forward")(_flat(op, inputs, state), state, _lengths(borders))
        return y, last, state.new_empty(0)

    def backward(
        self, op: str, inputs: tuple[Tensor, ...], state: Tensor, saved: Tensor, dy: Tensor, dstate: Tensor,
        borders: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As `Backend.backward`."""
        flat, dy = _flat(op, inputs, state), dy.flatten(0, 1).to(state.dtype)
        with torch.autocast(state.device.type, enabled=False):
            return getattr(self.module, f"{op}_backward")(flat, state, dy, dstate, _lengths(borders))  # type: ignore[no-any-return]


def _flat(op: str, inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, ...]:
    shared = native.CONSTANTS[op]
    return tuple((x if i in shared else x.flatten(0, 1)).to(state.dtype) for i, x in enumerate(inputs))


def _lengths(borders: Tensor) -> list[int]:
    return [end - begin for begin, end in pairwise(borders.tolist())]


BACKENDS: dict[str, Backend] = {
    "reference": Portable(reference),
    "chunked": Portable(chunked),
    "cpu": native.CPU,
    **{"cuda" if form == "auto" else f"cuda-{form}": cuda.Cuda(form) for form in cuda.FORMS},
    "fla": fla.Fla(Portable(chunked)),
}


def available(device: str) -> list[str]:
    """The backends that run on a device type, with what is installed here."""
    return [name for name in BACKENDS if _refusal(name, device) is None]


def _refusal(backend: str, device: str) -> str | None:
    """Why a backend does not run on a device type, or None."""
    if backend == "fla":
        return fla.missing(device)
    wanted = backend.split("-")[0]
    return f"does not run on {device}: choose auto" if wanted in ("cpu", "cuda") and device != wanted else None


def require_known(backend: str) -> None:
    """Raises: ValueError if there is no such backend on any device."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"kernel {backend!r} is not known; choose one of: auto, {', '.join(BACKENDS)}")


def constant(function: Any) -> Any:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler to set this mark."""
    function._dynamo_marked_constant = True
    return function


@constant
def choose(backend: str, device: str, size: int | None = None, double: bool = False) -> str:
    """The backend's name for a device type; says once what "auto" came to.

    Args: size: of a head, None where any will do. double: whether the inputs are float64.
    Raises: ValueError if there is no such backend, or not on this device.
    """
    require_known(backend)
    if backend == "auto":
        return _automatic(device, size in (None, *native.SIZES), double and device == "cuda")
    if refusal := _refusal(backend, device):
        raise ValueError(f"kernel {backend!r} {refusal}")
    return backend


@cache
def _automatic(device: str, fits: bool = True, double: bool = False) -> str:
    name = "chunked"
    try:
        if not fits:
            log.info("head sizes other than %s have no compiled kernel", ", ".join(map(str, native.SIZES)))
        elif device == "cpu":
            name = "cpu" if native.CPU.library else name
        elif device == "cuda" and not double:
            name = "cuda" if cuda.RECURRENT.library else name
    except RuntimeError as error:
        name = name if fla.missing(device) else "fla"
        log.warning("no compiled kernel: %s; %s is slower", error, name)
    log.info("wkv kernel on %s: %s", device, name)
    return name
