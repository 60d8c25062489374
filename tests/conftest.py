"""What all tests share."""

import os

import pytest
import torch

# Where there is no GPU, its kernels are interpreted: Triton settles that when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=[1, 2])
def threads(request):
    """Torch's threads, one and then two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
