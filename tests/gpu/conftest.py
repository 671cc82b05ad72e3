"""Tests of tests/gpu take their device from here.

LORRY_TEST_DEVICE=cpu, with TRITON_INTERPRET=1, runs on a machine without a GPU what of them can:
slowly, and only to try out the tests themselves.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run."""
    name = os.environ.get("LORRY_TEST_DEVICE", "cuda:0")
    assert name == "cpu" or torch.cuda.is_available(), "these tests need a GPU"
    return torch.device(name)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """For tests of what only a GPU has."""
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """What models are served in; the interpreter does not compute in it."""
    return torch.float16 if device.type == "cpu" else torch.bfloat16
