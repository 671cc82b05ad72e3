from pathlib import Path

import pytest

from tests.support.byte_model import write_byte_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's directory whose tokens are bytes."""
    return write_byte_model(tmp_path_factory.mktemp("model") / "byte-model")
