"""Law 7: however uneven documents lie over two ranks, no rank waits for ever, and the gradient is that of one rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("layout_ranks.py")


@pytest.mark.parametrize(("first", "count"), [(0, 4), pytest.param(100, 50, marks=pytest.mark.slow)])
def test_random_layouts(tmp_path, first, count):
    """Each rank with its own lanes; the wavefront; the scan."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, SCRIPT, str(rank), "2", tmp_path, str(first), str(count)] for rank in range(2)]
    ranks = [subprocess.Popen(x, env=environment, stderr=subprocess.PIPE, text=True) for x in commands]
    try:
        errors = [rank.communicate(timeout=60 * count)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    rows = [row for rank in range(2) for row in torch.load(tmp_path / f"{rank}.pt")]
    assert {layout for layout, *_ in rows} == set(range(first, first + count))
    wrong = [row for row in rows if not row[2] < 1e-11 or row[3] > 60]
    assert not wrong, f"layout, way, relative difference, seconds: {wrong}"
    print(f"{count} layouts, {len(rows)} gradients: at most {max(row[2] for row in rows):.1e} from one rank's")
