"""One build of the images for all tests."""

import os
from collections.abc import Iterator

import pytest

from tests.containers.engine import Engine, find_engine
from tests.containers.images import built_images


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that has the images."""
    engine = find_engine(tmp_path_factory.mktemp("engine"))
    with built_images(engine, os.environ.get("BASE_IMAGE", "")):
        yield engine
