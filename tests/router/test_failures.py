"""Requests that end badly: each with its documented status, and everything is free afterwards."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lorry.router.generation import Generation
from lorry.rpc.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    ContextLengthExceeded,
    DeadlineExpired,
    Draining,
    DuplicateRequest,
    FeatureUnsupported,
    Interrupted,
    InvalidRequest,
    ModelNotFound,
    PoolTooSmall,
    QueueFull,
    SloUnattainable,
    SlowReader,
    StoreUnavailable,
    TenantLimit,
    VersionNotFound,
)
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import LONG, tokens_of
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import ABORTED, LENGTH, Reply
from tests.support.router_stack import Stack, error_of, read_answer, router_stack
from tests.support.waiting import until

SPEC = pb.GenerationSpec(prompt="p")


async def serves_again(stack: Stack) -> None:
    """Nothing is left behind, and the next request succeeds."""
    await until(lambda: not stack.running.router._active)
    stack.check_idle()
    stack.worker.reply = lambda submit: Reply(tokens_of("ok"))
    assert (await stack.stream(SPEC)).text == "ok"
    stack.check_idle()


async def submitted(stack: Stack, num_submits: int) -> None:
    await stack.worker.until(lambda: len(stack.worker.submits) == num_submits)


# Refused before they are queued


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (pb.GenerationSpec(), InvalidRequest),
        (pb.GenerationSpec(prompt="p", adapter="adapters/none"), AdapterNotFound),
        (pb.GenerationSpec(prompt="p", adapter="tenants/u/adapters/a"), AdapterNotFound),
        (pb.GenerationSpec(prompt="p", model="other"), ModelNotFound),
        (pb.GenerationSpec(prompt="x" * 512), ContextLengthExceeded),
        (
            pb.GenerationSpec(prompt="x" * 500, stopping=common_pb2.StoppingOptions(max_tokens=12)),
            ContextLengthExceeded,
        ),
        (
            pb.GenerationSpec(prompt="x" * 500, stopping=common_pb2.StoppingOptions(min_tokens=12)),
            ContextLengthExceeded,
        ),
        (
            pb.GenerationSpec(prompt="p", guided=common_pb2.GuidedDecoding(regex="a")),
            FeatureUnsupported,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_cannot_be_served_is_refused(
    model: Path, spec: pb.GenerationSpec, error: type[Exception]
) -> None:
    async with router_stack(model) as stack:
        for refused in (stack.stream(spec), stack.generate(spec)):
            assert type(await error_of(refused)) is error
        assert stack.worker.submits == []
        await serves_again(stack)


async def test_a_rank_above_the_workers_limit_is_incompatible(model: Path) -> None:
    store = FakeStore()
    store.publish("tenants/default/adapters/big", b"v", rank=65)
    async with router_stack(model, store=store) as stack:
        error = await error_of(stack.stream(pb.GenerationSpec(prompt="p", adapter="adapters/big")))
        assert isinstance(error, AdapterIncompatible)
        assert error.metadata == {"rank": "65", "maxRank": "64"}
        await serves_again(stack)


async def test_a_workers_shorter_context_bounds_max_tokens(model: Path) -> None:
    def reply(submit: Any) -> Reply:
        return Reply(tokens_of("x"))

    async with router_stack(model, reply=reply, worker={"max_context_tokens": 100}) as stack:
        await stack.stream(pb.GenerationSpec(token_ids=common_pb2.TokenIds(ids=[5] * 90)))
        assert stack.worker.submits[0].max_tokens == 10


async def test_a_duplicate_request_id_is_refused_while_the_first_is_active(model: Path) -> None:
    spec = pb.GenerationSpec(prompt="p", request_id="same")
    async with router_stack(model) as stack:
        call = stack.open(spec)
        await submitted(stack, 1)
        assert isinstance(await error_of(stack.stream(spec)), DuplicateRequest)
        call.cancel()
        await serves_again(stack)


async def test_full_queues_refuse_with_a_hint(model: Path) -> None:
    limits: dict[str, Any] = {"max_queued_requests": 3, "max_queued_requests_per_tenant": 2}
    async with router_stack(model, worker={"submit_limit": 0}, **limits) as stack:
        calls = [asyncio.ensure_future(read_answer(stack.open(SPEC))) for _ in range(2)]
        await until(lambda: len(stack.running.router._active) == 2)
        error = await error_of(stack.stream(SPEC))
        assert isinstance(error, TenantLimit)
        assert error.retry_after_s is not None
        stack.worker.reply = lambda submit: Reply(tokens_of("ok"))
        stack.worker.raise_submit_limit(100)
        assert [answer.text for answer in await asyncio.gather(*calls)] == ["ok", "ok"]
        await serves_again(stack)


async def test_a_tenant_beyond_its_rate_is_refused_until_the_hint_says(model: Path) -> None:
    rates: dict[str, Any] = {"requests_per_s_per_tenant": 2.0, "rate_burst_s": 0.5}
    async with router_stack(model, reply=lambda _: Reply(tokens_of("ok")), **rates) as stack:
        assert (await stack.stream(SPEC)).text
        error = await error_of(stack.stream(SPEC))
        assert isinstance(error, TenantLimit)
        assert error.retry_after_s is not None
        await asyncio.sleep(error.retry_after_s)
        assert (await stack.stream(SPEC)).text


async def test_the_queue_of_all_tenants_is_bounded(model: Path) -> None:
    async with router_stack(model, worker={"submit_limit": 0}, max_queued_requests=1) as stack:
        call = stack.open(SPEC)
        await until(lambda: len(stack.running.router._active) == 1)
        error = await error_of(stack.stream(SPEC))
        assert isinstance(error, QueueFull)
        assert error.retry_after_s is not None
        call.cancel()
        stack.worker.raise_submit_limit(100)
        await serves_again(stack)


# Given up by the client


async def test_cancelling_in_the_queue_frees_the_place(model: Path) -> None:
    async with router_stack(model, worker={"submit_limit": 0}) as stack:
        call = stack.open(SPEC)
        await until(lambda: len(stack.running.router._active) == 1)
        call.cancel()
        await until(lambda: not stack.running.router._active)
        stack.worker.raise_submit_limit(100)
        await serves_again(stack)
        assert len(stack.worker.submits) == 1, "only the later request was submitted"
        assert stack.worker.cancels == []


async def test_cancelling_at_the_worker_cancels_there(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.open(SPEC)
        await submitted(stack, 1)
        call.cancel()
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        await serves_again(stack)


async def test_cancelling_in_mid_stream_cancels_at_the_worker(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.open(SPEC)
        await submitted(stack, 1)
        stack.worker.draw(1, *tokens_of("a"))
        await call.read()
        call.cancel()
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        await serves_again(stack)


async def test_a_cancelled_generate_cancels_at_the_worker(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.stub.Generate(pb.GenerateRequest(spec=SPEC))
        await submitted(stack, 1)
        call.cancel()
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        await serves_again(stack)


async def test_a_client_whose_connection_breaks_is_cancelled(model: Path) -> None:
    async with router_stack(model) as stack:
        address = f"127.0.0.1:{stack.running.server.port}"
        async with grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            lost = Stack(stack.running, stack.workers, stack.store, channel)
            call = lost.open(SPEC)
            await submitted(stack, 1)
            stack.worker.draw(1, *tokens_of("a"))
            await call.read()
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        await serves_again(stack)


@pytest.mark.parametrize("how", ["the context is left", "the client is lost"])
async def test_either_end_of_a_generation_is_enough(model: Path, how: str) -> None:
    """A lost client may never let its handler go on, and other callers have no client."""
    generation = Generation(request_id="r", tenant="default", adapter=None, prompt="p")
    async with router_stack(model) as stack:
        client_left: list[Callable[[], None]] = []
        async with stack.running.router.generate(
            generation, remaining_s=None, streaming=True, when_client_left=client_left.append
        ):
            await submitted(stack, 1)
            if how == "the client is lost":
                client_left[0]()
                await stack.worker.until(lambda: stack.worker.cancels == [1])
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        client_left[0]()
        await serves_again(stack)


def unread(stack: Stack) -> grpc.aio.Channel:
    """A channel over which little is sent ahead of what the client reads."""
    return grpc.aio.insecure_channel(
        f"127.0.0.1:{stack.running.server.port}",
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 1024),
        ],
    )


async def test_a_client_that_stops_reading_is_given_up_after_a_while(model: Path) -> None:
    async with router_stack(model, client_stall_s=0.4) as stack, unread(stack) as channel:
        stalled = Stack(stack.running, stack.workers, stack.store, channel)
        call = stalled.open(SPEC)
        await submitted(stack, 1)
        while not stack.worker.cancels:
            stack.worker.draw(1, LONG)
            await asyncio.sleep(0.002)
        assert isinstance(await error_of(read_answer(call)), SlowReader)
        await serves_again(stack)


async def test_a_slow_client_may_leave_only_so_many_tokens_unread(model: Path) -> None:
    async with (
        router_stack(model, max_unsent_tokens=20, client_stall_s=60) as stack,
        unread(stack) as channel,
    ):
        stalled = Stack(stack.running, stack.workers, stack.store, channel)
        call = stalled.open(SPEC)
        await submitted(stack, 1)
        while not stack.worker.cancels:
            stack.worker.draw(1, LONG)
            await asyncio.sleep(0.002)
        error = await error_of(read_answer(call))
        assert isinstance(error, SlowReader)
        assert "21 tokens" in str(error)
        await serves_again(stack)


async def test_a_client_that_reads_again_in_time_gets_everything(model: Path) -> None:
    async with router_stack(model) as stack, unread(stack) as channel:
        stalled = Stack(stack.running, stack.workers, stack.store, channel)
        call = stalled.open(SPEC)
        await submitted(stack, 1)
        for _ in range(300):
            stack.worker.draw(1, LONG)
            await asyncio.sleep(0)
        stack.worker.finish(1, LENGTH)
        await until(lambda: not stack.running.router._active)
        answer = await read_answer(call)
        assert answer.token_ids == [LONG] * 300
        assert len(answer.chunks) < 300, "they were coalesced"


# Ended by a deadline


async def test_a_deadline_while_the_store_does_not_answer(model: Path) -> None:
    store = FakeStore()
    store.hanging = True
    spec = pb.GenerationSpec(prompt="p", adapter="adapters/unknown")
    async with router_stack(model, store=store, max_request_s=0.2, store_timeout_s=20) as stack:
        error = await error_of(stack.stream(spec))
        assert isinstance(error, DeadlineExpired)
        assert error.metadata["state"] == "RECEIVED"
        await serves_again(stack)


async def test_a_deadline_in_the_queue(model: Path) -> None:
    async with router_stack(model, worker={"submit_limit": 0}, max_request_s=0.2) as stack:
        error = await error_of(stack.stream(SPEC))
        assert isinstance(error, DeadlineExpired)
        assert error.metadata["state"] == "QUEUED"
        stack.worker.raise_submit_limit(100)
        await serves_again(stack)


async def test_a_deadline_in_mid_stream(model: Path) -> None:
    async with router_stack(model, max_request_s=0.4) as stack:
        call = stack.open(SPEC)
        await submitted(stack, 1)
        stack.worker.draw(1, *tokens_of("ab"))
        error = await error_of(read_answer(call))
        assert isinstance(error, DeadlineExpired)
        assert error.metadata["state"] == "STREAMING"
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        await serves_again(stack)


async def test_the_clients_deadline_is_the_requests(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.open(SPEC, timeout_s=0.5)
        await submitted(stack, 1)
        assert 0 < stack.worker.submits[0].remaining.ToMilliseconds() < 1000
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        await serves_again(stack)


async def test_a_deadline_does_not_reach_a_request_that_has_ended(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(submit: Any) -> Reply:
        return Reply(tokens_of("ok"))

    async with router_stack(model, max_request_s=0.2, reply=reply) as stack:
        await stack.stream(SPEC)
        await asyncio.sleep(0.3)
        await serves_again(stack)
    assert not [record for record in caplog.records if record.name == "asyncio"]


# Ended by the worker


@pytest.mark.parametrize(
    "error", [PoolTooSmall("too large", pages=3), VersionNotFound("gone"), DeadlineExpired("late")]
)
async def test_a_workers_error_reaches_the_client(model: Path, error: Any) -> None:
    def reply(submit: Any) -> Reply:
        return Reply(tokens_of("ab"), ABORTED, error)

    async with router_stack(model, reply=reply) as stack:
        for refused in (stack.stream(SPEC), stack.generate(SPEC)):
            received = await error_of(refused)
            assert type(received) is type(error)
            assert str(received) == str(error)
            assert received.metadata == error.metadata
        await serves_again(stack)


async def test_an_adapter_that_the_worker_cannot_fetch_is_no_lost_worker(model: Path) -> None:
    error = StoreUnavailable("the adapter store is not available")
    async with router_stack(model, reply=lambda submit: Reply([], ABORTED, error)) as stack:
        received = await error_of(stack.stream(SPEC))
        assert type(received) is StoreUnavailable
        assert str(received) == str(error)
        assert len(stack.worker.submits) == 1, "the client may try again, not the router"
        await serves_again(stack)


async def test_one_bad_request_does_not_end_the_others(model: Path) -> None:
    async with router_stack(model) as stack:
        good = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        bad = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 2)
        stack.worker.draw(1, *tokens_of("a"))
        stack.worker.finish(2, ABORTED, PoolTooSmall("too large"))
        assert isinstance(await error_of(bad), PoolTooSmall)
        stack.worker.draw(1, *tokens_of("b"))
        stack.worker.finish(1, LENGTH)
        assert (await good).text == "ab"


# Ended by the router's own end


async def test_draining_finishes_what_runs_and_refuses_the_rest(model: Path) -> None:
    async with router_stack(model) as stack:
        running = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        draining = asyncio.create_task(stack.running.drain())
        await stack.until_health(ready=False)
        error = await error_of(stack.stream(SPEC))
        assert isinstance(error, Draining)
        assert error.retry_after_s is not None
        assert not draining.done()
        stack.worker.draw(1, *tokens_of("done"))
        stack.worker.finish(1, LENGTH)
        assert (await running).text == "done"
        await draining


async def test_what_still_runs_after_the_grace_is_ended(model: Path) -> None:
    async with router_stack(model, grace_s=0.3) as stack:
        waiting, streaming = (asyncio.ensure_future(stack.stream(SPEC)) for _ in range(2))
        await submitted(stack, 2)
        stack.worker.draw(2, *tokens_of("abc"))
        await until(lambda: 3 in stack.nums_sent)
        await stack.running.drain()
        errors = [await error_of(call) for call in (waiting, streaming)]
        assert sorted(type(error).__name__ for error in errors) == ["Draining", "Interrupted"]
        (interrupted,) = (error for error in errors if isinstance(error, Interrupted))
        assert interrupted.metadata == {"sentTokens": "3"}
        await stack.worker.until(lambda: sorted(stack.worker.cancels) == [1, 2])
        stack.check_idle()


async def test_an_slo_that_cannot_be_kept_is_refused_with_what_was_predicted(model: Path) -> None:
    async with router_stack(model, worker={"submit_limit": 1}) as stack:
        first = stack.open(pb.GenerationSpec(prompt="say"))
        await stack.worker.until(lambda: len(stack.worker.submits) == 1)
        asked = pb.GenerationSpec(prompt="say")
        asked.slo.ttft.FromMilliseconds(50)
        refusal = await error_of(stack.stream(asked))
        first.cancel()
        assert isinstance(refusal, SloUnattainable)
        assert refusal.metadata["askedTtftS"] == "0.05"
        assert float(refusal.metadata["predictedTtftS"]) >= 0.05
        assert refusal.retry_after_s is not None
        assert len(stack.worker.submits) == 1
        await until(lambda: not stack.running.router._active)
        stack.check_idle()
