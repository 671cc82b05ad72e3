import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 to run kernels on CPU"
    return torch.device("cpu")
