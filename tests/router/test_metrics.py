"""What the router tells Prometheus, by scrapes of a real router's port."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from lorry.router.generation import Generation
from lorry.rpc.errors import AdapterNotFound, PoolTooSmall, QueueFull
from lorry.rpc.names import AdapterName
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import tokens_of
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import ABORTED, LENGTH, Reply
from tests.support.router_stack import Stack, error_of, router_stack
from tests.support.scrape import Scrape, metrics_url, scrape, scrape_until
from tests.support.waiting import until

NUM_ADAPTERS = 10_000
IN_PROGRESS = "lorry_router_requests_in_progress"
SPEC = pb.GenerationSpec(prompt="say")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Where the port is logged."""
    caplog.set_level(logging.INFO, "lorry.rpc.metrics_server")
    return caplog


def says(text: str) -> Any:
    return lambda submit: Reply(tokens_of(text), LENGTH)


def check_reconciled(found: Scrape) -> None:
    """What was received has ended or is in progress."""
    ended = found.value("lorry_router_requests_total")
    in_progress = found.value(IN_PROGRESS)
    assert found.value("lorry_router_requests_received_total") == ended + in_progress


async def test_a_request_is_counted_in_every_stage(
    model: Path, log: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model, worker={"submit_limit": 1}) as stack:
        url = metrics_url(log.text)
        first = asyncio.ensure_future(stack.stream(SPEC))
        await stack.worker.until(lambda: len(stack.worker.submits) == 1)
        second = asyncio.ensure_future(stack.stream(SPEC))
        found = await scrape_until(url, lambda s: s.value(IN_PROGRESS, state="queued"))
        assert found.value(IN_PROGRESS, state="submitted") == 1
        assert found.value(IN_PROGRESS, state="queued") == 1
        assert found.value("lorry_router_predicted_ttft_seconds") > 0
        assert found.value("lorry_router_worker_requests", worker=stack.worker.address) == 1
        assert found.value("lorry_router_worker_submit_room", worker=stack.worker.address) == 0
        assert found.value("lorry_router_queue_seconds_count") == 1
        check_reconciled(found)

        stack.worker.draw(1, *tokens_of("abc"))
        stack.worker.finish(1, LENGTH)
        stack.worker.raise_submit_limit(2)
        assert (await first).text == "abc"
        await stack.worker.until(lambda: len(stack.worker.submits) == 2)
        stack.worker.finish(2, LENGTH)
        await second

        found = await scrape(url)
        assert found.value(IN_PROGRESS) == 0
        assert found.value("lorry_router_predicted_ttft_seconds") == 0
        assert found.value("lorry_router_requests_total", code="OK", reason="") == 2
        assert found.value("lorry_router_queue_seconds_count") == 2
        assert found.value("lorry_router_ttft_seconds_count") == 1
        assert found.value("lorry_router_token_gap_seconds_count") == 2
        assert found.value("lorry_router_output_tokens_total") == 3
        assert found.value("lorry_router_prompt_tokens_total") == 8
        check_reconciled(found)


async def test_ends_are_told_apart_by_code_and_reason(
    model: Path, log: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model) as stack:
        url = metrics_url(log.text)
        await error_of(stack.stream(pb.GenerationSpec(prompt="p", adapter="adapters/unknown")))
        await error_of(stack.stream(pb.GenerationSpec(prompt="p", model="another")))

        stack.worker.reply = lambda submit: Reply((), ABORTED, PoolTooSmall("too small"))
        await error_of(stack.stream(SPEC))

        stack.worker.reply = lambda submit: None
        left = stack.open(SPEC)
        await stack.worker.until(lambda: len(stack.worker.submits) == 2)
        left.cancel()
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(_read_all(stack.open(SPEC, timeout_s=0.3)), 20)

        found = await scrape_until(url, lambda s: not s.value(IN_PROGRESS))
        requests = "lorry_router_requests_total"
        assert found.value(requests, code="NOT_FOUND", reason="ADAPTER_NOT_FOUND") == 1
        assert found.value(requests, code="RESOURCE_EXHAUSTED", reason="POOL_TOO_SMALL") == 1
        gone = found.value(requests, code="CANCELLED")
        assert gone + found.value(requests, code="DEADLINE_EXCEEDED") == 2
        assert found.value("lorry_router_requests_received_total") == 4
        check_reconciled(found)
        # What is refused before it is a request is a call all the same.
        calls = "lorry_router_calls_total"
        assert found.value(calls, code="NOT_FOUND", reason="MODEL_NOT_FOUND") == 1


async def test_a_refused_request_is_received_and_ended(
    model: Path, log: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model, max_queued_requests=1, worker={"submit_limit": 0}) as stack:
        url = metrics_url(log.text)
        waiting = asyncio.ensure_future(stack.stream(SPEC))
        await scrape_until(url, lambda s: s.value(IN_PROGRESS, state="queued"))
        assert isinstance(await error_of(stack.stream(SPEC)), QueueFull)
        found = await scrape(url)
        assert found.value("lorry_router_requests_total", reason="QUEUE_FULL") == 1
        assert found.value("lorry_router_requests_received_total") == 2
        check_reconciled(found)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_request_whose_adapter_is_looked_for_is_in_progress(
    model: Path, log: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model) as stack:
        url, stack.store.hanging = metrics_url(log.text), True
        call = stack.open(pb.GenerationSpec(prompt="p", adapter="adapters/unknown"))
        await scrape_until(url, lambda s: s.value(IN_PROGRESS, state="received") == 1)
        call.cancel()
        check_reconciled(await scrape_until(url, lambda s: not s.value(IN_PROGRESS)))


async def test_a_lost_worker_leaves_its_counts_and_its_requests_are_resumed(
    model: Path, log: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model, num_workers=2) as stack:
        url = metrics_url(log.text)
        await scrape_until(url, lambda s: s.value("lorry_router_worker_attached") == 2)
        running = asyncio.ensure_future(stack.stream(SPEC))
        await until(lambda: any(worker.submits for worker in stack.workers))
        (lost,) = (worker for worker in stack.workers if worker.submits)
        (left,) = set(stack.workers) - {lost}
        lost.draw(1, *tokens_of("one "))
        await scrape_until(url, lambda s: s.value("lorry_router_output_tokens_total"))
        await stack.servers[list(stack.workers).index(lost)].aclose()
        await left.until(lambda: len(left.submits) == 1)

        found = await scrape(url)
        assert found.value("lorry_router_worker_attached", worker=lost.address) == 0
        assert found.value("lorry_router_worker_attached", worker=left.address) == 1
        assert found.label_values("lorry_router_worker_requests", "worker") == {left.address}
        assert found.value("lorry_router_workers_lost_total") == 1
        assert found.value("lorry_router_requests_resumed_total") == 1

        left.draw(1, *tokens_of("two"))
        left.finish(1, LENGTH)
        assert (await running).text == "one two"
        found = await scrape(url)
        assert found.value("lorry_router_ttft_seconds_count") == 1
        assert found.value("lorry_router_output_tokens_total") == len(tokens_of("one two"))
        assert found.value("lorry_router_prompt_tokens_total") == 4
        check_reconciled(found)


async def test_ten_thousand_adapters_of_a_hundred_tenants_have_the_series_of_one(
    model: Path, log: pytest.LogCaptureFixture
) -> None:
    names = [AdapterName(f"t{number % 100}", f"a{number}") for number in range(NUM_ADAPTERS)]
    unknown = [AdapterName("t0", f"unknown{number}") for number in range(100)]
    store = FakeStore()
    for number, name in enumerate(names):
        store.publish(str(name), number.to_bytes(32, "big"))
    no_limit = {"submit_limit": 1 << 40}
    async with router_stack(model, reply=says("x"), store=store, worker=no_limit) as stack:
        url = metrics_url(log.text)
        await _generate_each(stack, [names[0], unknown[0]])
        two = await scrape(url)
        await _generate_each(stack, names[1:] + unknown[1:])
        every = await scrape(url)
    assert every.value("lorry_router_catalogue_adapters") == len(names)
    assert every.value("lorry_router_requests_total", code="OK") == len(names)
    assert every.value("lorry_router_requests_total", code="NOT_FOUND") == len(unknown)
    assert _series(every) == _series(two)


async def _generate_each(stack: Stack, names: Sequence[AdapterName]) -> None:
    """One request of each adapter."""
    limit = asyncio.Semaphore(256)

    async def generate(name: AdapterName) -> None:
        generation = Generation(
            request_id=name.adapter, tenant=name.tenant, adapter=name, prompt="p"
        )
        async with limit:
            with contextlib.suppress(AdapterNotFound):
                async with stack.running.router.generate(
                    generation, remaining_s=60, streaming=False, when_client_left=lambda leave: None
                ) as output:
                    await output.next_chunk()

    await asyncio.gather(*map(generate, names))


def _series(found: Scrape) -> set[tuple[str, ...]]:
    return {(sample.name, *sample.labels.values()) for sample in found.samples}


async def _read_all(call: Any) -> None:
    async for _ in call:
        pass
