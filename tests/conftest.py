"""One thread a test process: the tests run side by side, and tiny matrices gain nothing from more."""

import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """How many kernel cases ran without a GPU."""
    passed = [x for x in terminalreporter.stats.get("passed", []) if "test_emulated.py" in x.nodeid]
    if passed:
        terminalreporter.write_line(f"CUDA kernels, emulated: {len(passed)} cases passed")
