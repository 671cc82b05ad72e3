"""The front's end of the link, with a process that computes nothing at the other end."""

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from lorry.worker import engine_client
from lorry.worker.config import EngineConfig
from lorry.worker.engine_client import EngineClient
from lorry.worker.messages import Cancel, Event, Finished, Started, Submit
from tests.support import scripted_engine
from tests.support.command import child_environment
from tests.support.waiting import until

CONFIG = EngineConfig(model=Path("none"), pool_pages=1)


class Engine:
    """A running engine and everything that it has sent."""

    process: psutil.Process

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.events: list[Event] = []

    def of_type(self, cls):
        return [event for event in self.events if isinstance(event, cls)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])


@contextlib.asynccontextmanager
async def running_engine(handle=None):
    client = EngineClient(CONFIG, command=scripted_engine.COMMAND, start_timeout_s=30, silence_s=30)
    engine = Engine(client)
    async with client.running(handle or engine.events.extend):
        (engine.process,) = psutil.Process().children()
        yield engine


def submit(number: int, num_tokens: int, first: int = scripted_engine.ECHO) -> Submit:
    tokens = [first] * num_tokens
    return Submit(number, "t", b"", tokens, 0, 1, 0, [], 0.0, 1, None)


async def test_the_first_event_tells_that_the_engine_has_started():
    async with running_engine() as engine:
        await until(lambda: bool(engine.events))
        assert isinstance(engine.events[0], Started)


async def test_the_engine_is_gone_once_the_client_has_closed():
    async with running_engine() as engine:
        await until(lambda: bool(engine.events))
    assert not engine.process.is_running()


async def test_more_than_the_ring_holds_arrives_in_order_once_the_engine_reads_again():
    async with running_engine() as engine:
        await until(lambda: bool(engine.events))
        engine.process.suspend()
        for number in range(1, 41):  # 40 MB
            engine.client.send(submit(number, 1_000_000))
        engine.client.send(submit(41, 1_000_000, first=scripted_engine.HOLD))
        engine.client.send(Cancel([41]))  # small enough to overtake, and then in vain
        assert not engine.of_type(Finished)
        engine.process.resume()
        await until(lambda: len(engine.of_type(Finished)) == 41)


async def test_an_engine_that_takes_no_commands_is_lost(monkeypatch):
    monkeypatch.setattr(engine_client, "MAX_BACKLOG_BYTES", 1_000_000)
    async with running_engine() as engine:
        await until(lambda: bool(engine.events))
        engine.process.suspend()
        for number in range(1, 20):
            engine.client.send(submit(number, 1_000_000))
        reason = await asyncio.wait_for(engine.client.lost(), 10)
        assert "takes no commands" in str(reason)
    assert not engine.process.is_running()


async def test_a_message_that_cannot_be_handled_loses_the_engine(caplog):
    def fail(events):
        raise RuntimeError("a defect")

    async with running_engine(fail) as engine:
        reason = await asyncio.wait_for(engine.client.lost(), 30)
        assert "cannot be handled" in str(reason)
    assert "a defect" in caplog.text
