"""Law 7: however uneven documents lie over two ranks, no rank waits for ever, and the gradient is that of one rank."""

import pytest
import torch
from ranks import run_ranks


@pytest.mark.parametrize(("first", "count"), [(0, 2), pytest.param(100, 50, marks=pytest.mark.slow)])
def test_random_layouts(tmp_path, first, count):
    """Each rank with its own lanes; the wavefront; the scan."""
    run_ranks("layout_ranks.py", 2, tmp_path, 2, tmp_path, first, count, timeout=60 * count)
    rows = [row for rank in range(2) for row in torch.load(tmp_path / f"{rank}.pt")]
    assert {layout for layout, *_ in rows} == set(range(first, first + count))
    wrong = [row for row in rows if not row[2] < 1e-11 or row[3] > 60]
    assert not wrong, f"layout, way, relative difference, seconds: {wrong}"
    print(f"{count} layouts, {len(rows)} gradients: at most {max(row[2] for row in rows):.1e} from one rank's")
