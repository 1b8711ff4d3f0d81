"""Law 6 on a GPU, for every backend that runs there: `cuda_laws.py`."""

import pytest
import torch
from cuda_laws import jobs, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty gives NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("job", jobs("cuda"), ids="-".join)
def test_kernel_equals_definition(job):
    row = run(job)
    print(f"{len(row['errors'])} cases")
    assert not row["wrong"]
