"""Which storages are alive while operations run on tensors that have shapes and no contents.

A mode of torch's dispatcher: the code that runs inside is the real one, down to the buffers of the kernels, and what it
would take from the allocator is counted without being taken.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense")
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Entry:
    """A storage that is alive."""

    __slots__ = ("born", "kind", "size")

    def __init__(self, size: int, kind: str, born: int) -> None:
        self.size, self.kind, self.born = size, kind, born


class Ledger(TorchDispatchMode):
    """Notes every storage that is made inside, by kind, and the peak of each phase.

    Integers are real: where sequences begin decides what is run.

    Args:
        device: cpu, or cuda: what the step is planned for.
        tile: shape of what counts as logits.
    """

    def __init__(self, device: str, tile: torch.Size) -> None:
        super().__init__()
        self.device, self.tile = device, tile
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.entries: dict[int, Entry] = {}
        self.now, self.phases = Counter[str](), dict[str, Counter[str]]()
        self.tops, self.peaks = Counter[str](), dict[str, int]()
        self.current, self.kind, self.clock, self.total = "", "other", 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "infctx":
            if self.device == "cuda" and func is torch.ops.infctx.rwkv7_prepare.default:
                args = (*args[:-1], args[0][2].dtype)  # a GPU's recurrence takes 16-bit inputs, a CPU's float32
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        empty = any(isinstance(x, FakeTensor) for x in given)
        if empty and func.name() in _READS and given[0].dtype == torch.bool:
            return False  # "is a decay out of range?": no
        if empty or (not given and _has_fractions(args, kwargs)):
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        return out

    @contextmanager
    def naming(self, kind: str) -> Iterator[None]:
        """What new storages are."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Whose peak is looked for, and beside it, as `forward`, that of what runs with a graph."""
        self.current = name
        self._look(name)
        try:
            with self.naming("activations"):
                yield
        finally:
            self.current = ""

    def rename(self, tensors: list[Tensor], kind: str) -> None:
        """Say better what some tensors are, also at the peak if they were there."""
        for x in tensors:
            entry = self.entries.get(x.untyped_storage()._cdata)
            if entry is None or entry.kind == kind:
                continue
            there = self.current and entry.born <= self.peaks[self.current]
            for frame in [self.now, *([self.phases[self.current]] if there else [])]:
                frame[entry.kind] -= entry.size
                frame[kind] += entry.size
            entry.kind = kind

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.entries:
            return
        self.clock += 1
        entry = Entry(storage.nbytes(), "logits" if x.shape == self.tile else self.kind, self.clock)
        self.entries[storage._cdata] = entry
        self.now[entry.kind] += entry.size
        self.total += entry.size
        weakref.finalize(storage, self._forget, storage._cdata)
        if self.current:
            self._look(self.current)
            if torch.is_grad_enabled():
                self._look("forward")

    def _look(self, phase: str) -> None:
        if self.total > self.tops[phase]:
            self.tops[phase], self.peaks[phase], self.phases[phase] = self.total, self.clock, Counter(self.now)

    def _forget(self, key: int) -> None:
        entry = self.entries.pop(key)
        self.now[entry.kind] -= entry.size
        self.total -= entry.size


def _has_fractions(args: Any, kwargs: Any) -> bool:
    """Whether a new tensor's contents do not matter: it is of floating point, and no single number."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point and bool(args) and isinstance(args[0], (list, tuple)) and len(args[0]) > 0
