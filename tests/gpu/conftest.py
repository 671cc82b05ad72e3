import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    assert torch.cuda.is_available(), "these tests need a GPU"
    return torch.device("cuda:0")
