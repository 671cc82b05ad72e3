"""Tests of tests/gpu take their device from here.

Tests marked `gpus(N)` need N of them, and are deselected where there are fewer.

LORRY_TEST_DEVICE=cpu, with TRITON_INTERPRET=1, runs on a machine without a GPU what of them can:
slowly, and only to try out the tests themselves.
"""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(number): deselected where there are fewer GPUs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    lacking = [item for item in items if _gpus(item) > found]
    if lacking:
        most = max(map(_gpus, lacking))
        print(f"\n{len(lacking)} tests are left out: they need {most} GPUs, and here are {found}")
        config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if _gpus(item) <= found]


def _gpus(item: pytest.Item) -> int:
    marker = item.get_closest_marker("gpus")
    return marker.args[0] if marker else 0


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
