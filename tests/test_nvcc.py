"""What nvcc makes of the kernels, without a GPU: nothing spilled, no array in local memory, tensor cores used."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from infctx.ops.build import SOURCES

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = [pytest.param("80", marks=pytest.mark.slow), "90a", pytest.param("100", marks=pytest.mark.slow)]
FILES = sorted(x.name for x in SOURCES.glob("*.cu"))
USE = re.compile(
    r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the kernels with")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_budgets(file, arch, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    command = [NVCC, "-cubin", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", cubin, SOURCES / file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = USE.findall(done.stderr)
    assert found and len(found) == done.stderr.count("Compiling entry function")
    for name, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        assert (stack, stores, loads) == (0, 0, 0), f"{name}: {stack} bytes of stack, {stores + loads} spilled"
        assert registers <= 255
    print(f"{file} sm_{arch}: {len(found)} kernels, at most {max(int(x[-1]) for x in found)} registers")
    if "_mma" in file:
        assert_tensor_cores(cubin, [name for name, *_ in found])


def assert_tensor_cores(cubin, names):
    """Every kernel of the file but its sums has HMMA instructions."""
    spec = importlib.util.find_spec("nvidia.cu13")
    found = [
        file for root in (spec.submodule_search_locations if spec else ()) for file in Path(root).glob("bin/nvdisasm")
    ]
    program = next(map(str, found), shutil.which("nvdisasm"))
    if program is None:
        pytest.skip("no nvdisasm to look for tensor-core instructions with: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", text, re.DOTALL | re.MULTILINE))
    for name in names:
        if "sum" not in name:
            assert "HMMA" in bodies[name], f"{name}: no tensor-core instruction"
        assert not re.search(r"\b(LDL|STL)\b", bodies[name]), f"{name}: local memory"
