from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.adapter_store import Client, RunningStore, running_store


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningStore]:
    """A store whose books are right at the end of each test."""
    async with running_store(tmp_path) as store:
        yield store
        store.store.images.check_integrity()


@pytest.fixture
def client(running: RunningStore) -> Client:
    return running.client
