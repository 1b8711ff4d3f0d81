"""Compiled kernels: built by ninja on first use, kept by the hash of what they are made from.

Plain C called through ctypes, without torch's headers: an empty extension with them takes 22 s to compile, these
kernels a part of that, and one build serves every version of torch and Python.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

SOURCES = next(x for x in (Path(__file__).parents[1] / "cuda", Path(__file__).parents[2] / "cuda") if x.exists())
CPU_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast"
ISAS = {"avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma", "avx2": "-mavx2 -mfma", "plain": ""}


def build_cpu() -> Path:
    """The shared library of the CPU kernels. Raises: RuntimeError if there is no C++ compiler, or it fails."""
    compiler = _find("c++", "g++", "clang++", what="C++ compiler")
    isas = ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"plain": ""}
    sources = ("wkv4_cpu.cpp", "wkv6_cpu.cpp", "wkv7_cpu.cpp", "fused_cpu.cpp", "fused_heads_cpu.cpp")
    flags = {f"{x} {isa}": f"-DISA={isa} {extra}" for x in sources for isa, extra in isas.items()}
    flags |= {"cpu.cpp": " ".join(f"-DHAVE_{isa.upper()}" for isa in isas)}
    return _build("cpu", compiler, CPU_FLAGS, flags, "-shared -fopenmp")


def build_cuda(capability: tuple[int, int]) -> Path:
    """The shared library of the CUDA kernels. Args: capability: of the device. Raises: RuntimeError as `build_cpu`."""
    compiler = _find("nvcc", "/usr/local/cuda/bin/nvcc", what="CUDA compiler (nvcc)")
    arch = "".join(map(str, capability))
    options = f"-std=c++17 -O3 -Xcompiler -fPIC -arch=sm_{arch}"
    return _build(
        "cuda", compiler, options, {x.name: "" for x in sorted(SOURCES.glob("*.cu"))}, f"-shared -arch=sm_{arch}"
    )


def build_emulated(folder: Path) -> Path:
    """The CUDA sources compiled as host C++ into a folder, each thread a fiber: for tests without a GPU."""
    compiler = _find("g++", what="g++")
    options = "-x c++ -std=c++17 -O2 -fPIC -fopenmp -fno-strict-aliasing"
    return _build(
        "emulated", compiler, options, {x.name: "" for x in sorted(SOURCES.glob("*.cu"))}, "-shared -fopenmp", folder
    )


def _find(*names: str, what: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"no {what} found (looked for {', '.join(names)})")
    return found


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _build(
    kind: str, compiler: str, options: str, objects: dict[str, str], link: str, root: Path | None = None
) -> Path:
    """Args: objects: what to compile ("source" or "source name") -> its own flags. link: flags of the last step."""
    files = sorted({x.split()[0] for x in objects} | {x.name for x in SOURCES.iterdir() if x.suffix in (".h", ".cuh")})
    parts = [options, str(objects), link, _version(compiler), platform.machine()]
    parts += [(SOURCES / x).read_text() for x in files]
    name = f"{kind}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    folder = (root or _cache()) / name
    library = folder / "libwkv.so"
    if library.exists():
        return library
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the system lets go of it when a process dies
        if not library.exists():
            print(f"building the wkv kernels ({kind}) once, into {folder}", file=sys.stderr, flush=True)
            for left in folder.parent.glob(f".{name}.*"):  # of a process that was killed while it built
                shutil.rmtree(left)
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
            try:
                (part / "build.ninja").write_text(_recipe(compiler, options, objects, link))
                _ninja(part)
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return library


def _recipe(compiler: str, options: str, objects: dict[str, str], link: str) -> str:
    lines = [f"rule compile\n  command = {compiler} {options} $flags -c $in -o $out",
             f"rule link\n  command = {compiler} $in -o $out {link}"]  # fmt: skip
    outputs = []
    for target, flags in objects.items():
        outputs.append(f"{target.replace(' ', '.')}.o")
        source = str(SOURCES / target.split()[0]).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.append(f"build {outputs[-1]}: compile {source}\n  flags = {flags}")
    return "\n".join([*lines, f"build libwkv.so: link {' '.join(outputs)}", ""])


def _ninja(folder: Path) -> None:
    program = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise RuntimeError("no ninja found: pip install ninja")
    done = subprocess.run([program, "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        errors = [x for x in done.stdout.splitlines() if "error: " in x][:2] or done.stdout.splitlines()[-2:]
        raise RuntimeError("the wkv kernels did not compile: " + " | ".join(errors))


def _cache() -> Path:
    home = Path.home() / ".cache" / "infctx"
    try:
        home.mkdir(parents=True, exist_ok=True)
        return home
    except (OSError, RuntimeError):  # no home, or a read-only one
        own = Path(tempfile.gettempdir()) / f"infctx-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.stat().st_uid != os.getuid():
            raise RuntimeError(f"{own} belongs to somebody else: code is not loaded from there") from None
        return own
