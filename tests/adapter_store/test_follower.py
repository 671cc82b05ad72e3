import asyncio
import logging
from typing import Any

import pytest

from lorry.adapter_store.follower import Follower
from tests.support.waiting import until


class Defective:
    """A catalogue that can never catch up."""

    async def catch_up(self, *, wait: bool) -> None:
        raise RuntimeError("a defect")


async def test_a_defect_that_stays_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="lorry.adapter_store.follower")
    catalogue: Any = Defective()
    following = asyncio.create_task(Follower(catalogue).run())
    await until(lambda: len(caplog.records) == 3)
    following.cancel()
    await asyncio.wait([following])
    assert [r.levelno for r in caplog.records] == [logging.ERROR, logging.DEBUG, logging.DEBUG]
    assert caplog.records[0].exc_info is not None
