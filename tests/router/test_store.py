"""The copy of the catalogue, over a real connection to a store that misbehaves as told."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorry.router.catalogue import AdapterVersion
from lorry.router.store import Store
from lorry.rpc.channel import open_channel
from lorry.rpc.errors import AdapterNotFound, StoreUnavailable
from lorry.rpc.names import AdapterName
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import tokens_of
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import Reply
from tests.support.router_stack import error_of, router_stack
from tests.support.waiting import until

A = AdapterName("t", "a")
ONE, TWO = AdapterVersion(b"1", 8, 0), AdapterVersion(b"2", 16, 0)


@contextlib.asynccontextmanager
async def watching(fake: FakeStore, *, silence_s: float = 30.0) -> AsyncIterator[Store]:
    """A Store that has read everything."""
    synced = asyncio.Event()
    async with fake.serving(), open_channel(fake.address) as channel:
        store = Store(channel, silence_s=silence_s, timeout_s=0.5, on_synced=synced.set)
        watch = asyncio.create_task(store.watch())
        try:
            await asyncio.wait_for(synced.wait(), 10)
            yield store
        finally:
            watch.cancel()
            await asyncio.wait([watch])


async def eventually(store: Store, name: AdapterName, published: AdapterVersion) -> None:
    await until(lambda: store._catalogue.get(name) == published)


async def test_a_known_name_needs_no_question() -> None:
    fake = FakeStore()
    fake.publish(str(A), *ONE[:1], rank=8)
    async with watching(fake) as store:
        assert await store.resolve(A) == ONE
        assert fake.asked == []


async def test_changes_arrive() -> None:
    fake = FakeStore()
    fake.publish(str(A), b"1", rank=8)
    async with watching(fake) as store:
        fake.publish(str(A), b"2", rank=16)
        await eventually(store, A, TWO)
        fake.delete(str(A))
        await until(lambda: store._catalogue.get(A) is None)
        with pytest.raises(AdapterNotFound, match="tenants/t/adapters/a is not registered"):
            await store.resolve(A)


async def test_what_was_pushed_a_moment_ago_is_found_by_asking() -> None:
    fake = FakeStore()
    fake.lagging = True
    async with watching(fake) as store:
        fake.publish(str(A), b"1", rank=8)
        assert await store.resolve(A) == ONE
        assert fake.asked == [str(A)]


async def test_many_requests_for_an_unknown_name_ask_once() -> None:
    fake = FakeStore()
    async with watching(fake) as store:
        errors = await asyncio.gather(*(error_of(store.resolve(A)) for _ in range(20)))
        assert {type(error) for error in errors} == {AdapterNotFound}
        assert fake.asked == [str(A)]
        assert isinstance(await error_of(store.resolve(A)), AdapterNotFound)
        assert len(fake.asked) == 2, "the answer is not kept"


async def test_a_client_that_leaves_does_not_spoil_the_question_for_others() -> None:
    fake = FakeStore()
    fake.lagging = True
    async with watching(fake) as store:
        fake.publish(str(A), b"1", rank=8)
        leaving, staying = (asyncio.ensure_future(store.resolve(A)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == ONE


async def test_an_unknown_name_of_a_store_that_does_not_answer_is_not_called_unknown() -> None:
    fake = FakeStore()
    async with watching(fake) as store:
        fake.failing = True
        with pytest.raises(StoreUnavailable) as failure:
            await store.resolve(A)
        assert failure.value.retry_after_s is not None


async def test_the_question_has_a_short_time_out() -> None:
    fake = FakeStore()
    async with watching(fake) as store:
        fake.hanging = True
        start_s = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.resolve(A)
        assert time.monotonic() - start_s < 10  # it waits 0.5 s; the bound guards against hanging


async def test_a_broken_watch_continues_where_it_was() -> None:
    fake = FakeStore()
    fake.publish(str(A), b"1", rank=8)
    async with watching(fake) as store:
        fake.end_watches()
        await until(lambda: len(fake.watches) == 2)
        assert fake.watches[1].start_revision == fake.revision
        assert fake.watches[1].store_id == fake.store_id
        fake.publish(str(A), b"2", rank=16)
        await eventually(store, A, TWO)


async def test_a_compacted_revision_makes_it_read_everything() -> None:
    fake = FakeStore()
    fake.publish(str(A), b"1", rank=8)
    other = AdapterName("t", "b")
    async with watching(fake) as store:
        fake.lagging = True
        fake.delete(str(A))
        fake.publish(str(other), b"2", rank=16)
        fake.oldest_revision = fake.revision
        fake.end_watches()
        await eventually(store, other, TWO)
        assert store._catalogue.get(A) is None
        assert [watch.start_revision for watch in fake.watches][-1] == 0


async def test_another_store_behind_the_address_is_read_anew() -> None:
    fake = FakeStore()
    fake.publish(str(A), b"1", rank=8)
    async with watching(fake) as store:
        fake.store_id = "store-2"
        fake.adapters.clear()
        fake.publish(str(A), b"2", rank=16)
        fake.end_watches()
        await eventually(store, A, TWO)
        assert store._catalogue.store_id == "store-2"


async def test_silence_makes_it_connect_again() -> None:
    fake = FakeStore()
    async with watching(fake, silence_s=0.2):
        await until(lambda: len(fake.watches) >= 3)


async def test_messages_keep_the_watch() -> None:
    fake = FakeStore()
    async with watching(fake, silence_s=0.5):
        for index in range(12):
            fake.publish(str(A), bytes([index]))
            await asyncio.sleep(0.1)
        assert len(fake.watches) == 1


async def test_while_the_watch_is_broken_known_names_are_asked_too() -> None:
    fake = FakeStore()
    fake.publish(str(A), b"1", rank=8)
    async with watching(fake) as store:
        fake.refusing = True
        fake.end_watches()
        await until(lambda: not store._watching)
        fake.publish(str(A), b"2", rank=16)
        assert await store.resolve(A) == TWO
        fake.failing = True
        assert await store.resolve(A) == ONE, "the copy is better than nothing"


async def test_a_store_that_stays_away_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="lorry.router.store")
    fake = FakeStore()
    async with watching(fake) as store:
        fake.failing = fake.refusing = True
        fake.end_watches()
        await until(lambda: len(levels(caplog, "the watch of the catalogue broke")) == 4)
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await store.resolve(A)
    ended, refused, *again = levels(caplog, "the watch of the catalogue broke")
    assert (ended, refused) == (logging.WARNING, logging.WARNING)
    assert set(again) == {logging.DEBUG}
    assert levels(caplog, "the store did not answer") == [logging.WARNING, *[logging.DEBUG] * 2]


def levels(caplog: pytest.LogCaptureFixture, beginning: str) -> list[int]:
    """Of the messages that begin so."""
    return [r.levelno for r in caplog.records if r.getMessage().startswith(beginning)]


# Through the whole router


async def test_the_router_is_not_ready_before_it_knows_the_catalogue(model: Path) -> None:
    fake = FakeStore()
    fake.refusing = True
    async with router_stack(model, store=fake, wait=False) as stack:
        await until(lambda: len(fake.watches) >= 2)
        await stack.until_health(ready=False)
        fake.refusing = False
        await stack.until_health(ready=True)


async def test_a_pushed_adapter_can_be_called_at_once(model: Path) -> None:
    fake = FakeStore()
    fake.lagging = True
    spec = pb.GenerationSpec(prompt="p", adapter="adapters/new")
    async with router_stack(model, store=fake, reply=lambda submit: Reply(tokens_of("x"))) as stack:
        assert isinstance(await error_of(stack.stream(spec)), AdapterNotFound)
        fake.publish("tenants/default/adapters/new", b"v1")
        answer = await stack.stream(spec)
        assert answer.completed is not None
        assert answer.completed.version == b"v1"


async def test_the_version_on_arrival_is_kept_to_the_end(model: Path) -> None:
    fake = FakeStore()
    fake.publish("tenants/default/adapters/a", b"v1")
    spec = pb.GenerationSpec(prompt="p", adapter="adapters/a")
    async with router_stack(model, store=fake, worker={"submit_limit": 0}) as stack:
        call = asyncio.ensure_future(stack.stream(spec))
        router: Any = stack.running.router
        await until(lambda: any(request.version for request in router._active))
        fake.publish("tenants/default/adapters/a", b"v2")
        catalogue, name = router._resolver._catalogue, AdapterName("default", "a")
        await until(lambda: catalogue.get(name).version == b"v2")
        stack.worker.reply = lambda submit: Reply(tokens_of("x"))
        stack.worker.raise_submit_limit(10)
        first = (await call).completed
        second = (await stack.stream(spec)).completed
        assert first is not None
        assert second is not None
        assert (first.version, second.version) == (b"v1", b"v2")
