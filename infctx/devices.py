"""What a device can do: a table from the vendors' data sheets, and this machine, measured.

Rates are operations a second in dense matrix products, without sparsity, bytes are bytes.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU.

    Args:
        name: as in the table; measured for this machine.
        kind: cuda or cpu: which kernels run on it.
        memory: bytes of it.
        fp32, bf16: operations a second in matrix products; fp32 without TF32, as torch computes it.
        bandwidth: bytes a second between it and its memory.
        link: bytes a second to and from the other ranks of the machine, both directions together.
        multiprocessors: how many it has.
        utilisation: share of the matrix rate that a training step reaches: an assumption.
        reserve: share of the memory that is not ours: driver, context, what the allocator cannot hand out.
        source: where the figures are from.
    """

    name: str
    kind: str
    memory: int
    fp32: float
    bf16: float
    bandwidth: float
    link: float
    multiprocessors: int
    utilisation: float = 0.4
    reserve: float = 0.08
    source: str = "the vendor's data sheet"

    @property
    def usable(self) -> int:
        """Bytes that a rank may plan with."""
        return int(self.memory * (1 - self.reserve))

    def rate(self, precision: str) -> float:
        """Operations a second in matrix products. Args: precision: fp32 or bf16."""
        return self.fp32 if precision == "fp32" else self.bf16


def _sheet(
    name: str, gib: int, fp32: float, bf16: float, bandwidth: float, link: float, multiprocessors: int
) -> Device:
    """Args: rates in 1e12 operations a second, bandwidth and link in 1e9 bytes a second."""
    return Device(name, "cuda", gib * GIB, fp32 * 1e12, bf16 * 1e12, bandwidth * 1e9, link * 1e9, multiprocessors)


# name, GiB, fp32, bf16, memory, link (NVLink; PCI Express 4 or 5 x16 where there is none), multiprocessors
_SHEETS = (
    ("b200", 180, 75.0, 2250.0, 7700, 1800, 148),
    ("h200", 141, 67.0, 989.0, 4800, 900, 132),
    ("h100", 80, 67.0, 989.0, 3350, 900, 132),
    ("a100-80", 80, 19.5, 312.0, 2039, 600, 108),
    ("a100-40", 40, 19.5, 312.0, 1555, 600, 108),
    ("l40s", 48, 91.6, 362.0, 864, 64, 142),
    ("rtx5090", 32, 104.8, 209.5, 1792, 128, 170),
    ("rtx4090", 24, 82.6, 165.2, 1008, 64, 128),
    ("rtx3090", 24, 35.6, 71.0, 936, 64, 82),
)
DEVICES = {row[0]: _sheet(*row) for row in _SHEETS}


def find(name: str) -> Device:
    """A device of the table, or `measured`, in whatever case, with dashes or without.

    Raises: ValueError if there is none of that name.
    """
    known = {_plain(x): x for x in ("measured", *DEVICES)}
    if _plain(name) not in known:
        raise ValueError(f"--device {name!r} is not known; choose one of: {', '.join(known.values())}")
    return DEVICES[known[_plain(name)]] if known[_plain(name)] != "measured" else measured()


def _plain(name: str) -> str:
    return "".join(x for x in name.lower() if x.isalnum())


def measured() -> Device:
    """This machine: its first GPU if it has one, else its CPU. Takes a second or two."""
    if torch.cuda.is_available():
        return _this_gpu()
    fp32, bf16 = (_matrix_rate(dtype, "cpu", 1024) for dtype in PRECISIONS.values())
    copies, threads = _copy_rate("cpu", 1 << 26), torch.get_num_threads()
    source = f"measured on this CPU with {threads} threads, its memory is what is free now"
    return Device("measured", "cpu", _free_memory(), fp32, bf16, copies, copies, 0, 0.6, 0.03, source)


def _this_gpu() -> Device:
    sheet: Any = torch.cuda.get_device_properties(0)
    fp32, bf16 = (_matrix_rate(dtype, "cuda", 8192) for dtype in PRECISIONS.values())
    plain = sheet.name.upper().replace(" ", "")
    link = next((d.link for d in DEVICES.values() if d.name.split("-")[0].upper() in plain), 64e9)
    return Device(
        "measured", "cuda", sheet.total_memory, fp32, bf16, _copy_rate("cuda", GIB), link, sheet.multi_processor_count,
        source=f"measured on {sheet.name}; its link is from a data sheet",
    )  # fmt: skip


def _matrix_rate(dtype: torch.dtype, device: str, n: int) -> float:
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def _copy_rate(device: str, size: int) -> float:
    """Bytes read and written in a second."""
    a, b = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _seconds(lambda: b.copy_(a), device)


def _seconds(f: Callable[[], object], device: str, rounds: int = 5) -> float:
    """The fastest of some rounds, after one that is not counted."""
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def _free_memory() -> int:
    """Bytes that a new process could take on this machine."""
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
