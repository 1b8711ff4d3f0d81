"""Which storages are alive while operations run on tensors that have shapes and no contents.

A mode of torch's dispatcher: the code that runs inside is the real one, down to the buffers of the kernels, and what it
would take from the allocator is counted without being taken.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
_DEVICE = torch.ops.prim.device.default
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_MASKED = (torch.ops.aten.native_layer_norm_backward.default, torch.ops.aten.native_group_norm_backward.default)


class Entry:
    """A storage that is alive."""

    __slots__ = ("born", "kind", "size", "watch")

    def __init__(self, size: int, kind: str, born: int, watch: object) -> None:
        self.size, self.kind, self.born, self.watch = size, kind, born, watch


class Recipe(NamedTuple):
    """How a result came about: as one of the given tensors, as a view of one, or new."""

    given: int | None
    view: bool
    layout: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset from the given one's
    dtype: torch.dtype
    device: torch.device
    room: int  # bytes of a new one

    def make(self, mode: FakeTensorMode, given: list[Tensor]) -> Tensor:
        """The same from others of the same sizes."""
        if self.given is not None and not self.view:
            return given[self.given]
        shape, strides, offset = self.layout
        x = torch.empty(0, dtype=self.dtype, device="meta")
        if self.given is None:
            x.set_(torch.UntypedStorage(self.room, device="meta"), offset, shape, strides)
        else:
            source = given[self.given]
            x.set_(source.untyped_storage(), source.storage_offset() + offset, shape, strides)
        return FakeTensor(mode, x, self.device)


Made = dict[Any, tuple[type | None, list[Recipe]]]  # results, None if not several, by operation and sizes


class Ledger(TorchDispatchMode):
    """Notes every storage that is made inside, by kind, and the peak of each phase at each place in the model.

    Integers are real: where sequences begin decides what is run.

    Args:
        device: cpu, or cuda: what the step is planned for.
        tile: shape of what counts as logits.
        made: results by operation and sizes, of ledgers before; filled.
    """

    def __init__(self, device: str, tile: torch.Size, made: Made) -> None:
        super().__init__()
        self.device, self.tile = device, tile
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.made, self.place = made, ""
        self.entries: dict[int, Entry] = {}
        self.now, self.frames = Counter[str](), dict[tuple[str, str], Counter[str]]()  # by phase and place
        self.tops, self.peaks = Counter[tuple[str, str]](), dict[tuple[str, str], int]()
        self.current, self.kind, self.clock, self.total = "", "other", 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # most calls are this question
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "infctx":
            if self.device == "cuda" and func is torch.ops.infctx.rwkv7_prepare.default:
                args = (*args[:-1], args[0][2].dtype)  # a GPU's recurrence takes 16-bit inputs, a CPU's float32
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        if func in _MASKED:  # a gradient that is not wanted, of one vector, would be none, which has no place here
            args = (*args[:-1], [True] * len(args[-1]))
        given = list(_tensors((args, kwargs)))
        empty = [isinstance(x, FakeTensor) for x in given]
        if empty and empty[0] and func in _READS and given[0].dtype == torch.bool:
            return False  # "is a decay out of range?": no
        if empty and all(empty):
            out = self._known(func, args, kwargs, given)
        elif any(empty) or (not given and _has_fractions(args, kwargs)):
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for x in _tensors(out):
            self._note(x)
        return out

    def _known(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The result on tensors without contents: looked up, if sizes are as they were before."""
        key = (func, _sizes(args), tuple(kwargs), _sizes(kwargs.values()))
        if key not in self.made:
            with self.fake:
                out = func(*args, **kwargs)
            recipes = _recipes(out, given)
            if recipes is not None and func is not torch.ops.aten.as_strided.default:  # its offset is the storage's
                self.made[key] = type(out) if isinstance(out, (list, tuple)) else None, recipes
            return out
        several, recipes = self.made[key]
        found = [x.make(self.fake, given) for x in recipes]
        return several(found) if several else found[0] if found else None

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
        self.current, self.place = name, ""
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
            there = [x for x, peak in self.peaks.items() if x[0] == self.current and entry.born <= peak]
            for frame in [self.now, *(self.frames[x] for x in there)]:
                frame[entry.kind] -= entry.size
                frame[kind] += entry.size
            entry.kind = kind

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.entries:
            return
        self.clock += 1
        watch = weakref.ref(storage, partial(self._forget, storage._cdata))
        entry = Entry(storage.nbytes(), "logits" if x.shape == self.tile else self.kind, self.clock, watch)
        self.entries[storage._cdata] = entry
        self.now[entry.kind] += entry.size
        self.total += entry.size
        if self.current:
            self._look(self.current)
            if torch.is_grad_enabled():
                self._look("forward")

    def _look(self, phase: str) -> None:
        at = phase, self.place
        if self.total > self.tops[at]:
            self.tops[at], self.peaks[at], self.frames[at] = self.total, self.clock, Counter(self.now)

    def _forget(self, key: int, _: object) -> None:
        entry = self.entries.pop(key)
        self.now[entry.kind] -= entry.size
        self.total -= entry.size


def _has_fractions(args: Any, kwargs: Any) -> bool:
    """Whether a new tensor's contents do not matter: it is of floating point, and no single number."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point and bool(args) and isinstance(args[0], (list, tuple)) and len(args[0]) > 0


def _tensors(x: Any) -> Iterator[Tensor]:
    """Those that an operation was given, or gave."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))


def _sizes(values: Any) -> tuple[Any, ...]:
    """All that the sizes of a result depend on."""
    return tuple(
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor)
        else _sizes(x) if isinstance(x, (list, tuple)) else (type(x), x)
        for x in values
    )  # fmt: skip


def _recipes(out: Any, given: list[Tensor]) -> list[Recipe] | None:
    """None if the result cannot be made again from them: no tensor without contents, or two with one new storage."""
    storages = [x.untyped_storage()._cdata for x in given]
    found, new = list[Recipe](), set[int]()
    if not isinstance(out, Tensor | list | tuple | None):
        return None
    for x in _tensors(out):
        storage = x.untyped_storage()
        if not isinstance(x, FakeTensor) or storage._cdata in new:
            return None
        same = next((i for i, y in enumerate(given) if y is x), None)
        index = same if same is not None else _index(storages, storage._cdata)
        if index is None:
            new.add(storage._cdata)
        offset = int(x.storage_offset()) - (0 if index is None else int(given[index].storage_offset()))
        layout = tuple(x.shape), x.stride(), offset
        found.append(Recipe(index, same is None, layout, x.dtype, x.device, storage.nbytes()))
    return found


def _index(values: list[int], value: int) -> int | None:
    return values.index(value) if value in values else None
