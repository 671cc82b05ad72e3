"""Workers that come, go, fall silent or hold back, and what becomes of their requests."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from lorry.router import worker_link, worker_messages
from lorry.router.request import Request
from lorry.rpc.errors import Draining, NoWorker, StoreUnavailable, WorkerLost
from lorry.rpc.status import to_status
from lorry.v1 import common_pb2, worker_service_pb2
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import tokens_of
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import ABORTED, CANCELLED, LENGTH, FakeWorker, Reply
from tests.support.router_stack import Stack, error_of, router_stack
from tests.support.waiting import until

SPEC = pb.GenerationSpec(prompt="p")
OK = Reply(tokens_of("ok"))


async def submitted(stack: Stack, num_submits: int) -> None:
    await stack.worker.until(lambda: len(stack.worker.submits) == num_submits)


async def sent(stack: Stack, num_tokens: int) -> None:
    """Wait until the only request's client has taken so many tokens."""
    await until(lambda: stack.nums_sent == [num_tokens])


def store_with(*versions: bytes) -> FakeStore:
    store = FakeStore()
    for version in versions:
        store.publish(f"tenants/default/adapters/{version.decode()}", version)
    return store


def spec_of(version: bytes) -> pb.GenerationSpec:
    return pb.GenerationSpec(prompt="p", adapter=f"adapters/{version.decode()}")


async def test_hello_says_who_attaches(model: Path) -> None:
    async with router_stack(model) as stack:
        (hello,) = stack.worker.hellos
    assert hello.model_digest == stack.worker.model_digest
    assert hello.protocol_revision == 1
    assert hello.router_id


async def test_no_submit_is_sent_beyond_the_limit(model: Path) -> None:
    async with router_stack(model, worker={"submit_limit": 1}) as stack:
        calls = [asyncio.ensure_future(stack.stream(SPEC)) for _ in range(3)]
        await submitted(stack, 1)
        stack.worker.finish(1, LENGTH)
        await asyncio.sleep(0.2)
        assert len(stack.worker.submits) == 1, "an end does not raise the limit"
        stack.worker.reply = lambda submit: OK
        stack.worker.raise_submit_limit(3)
        answers = await asyncio.gather(*calls)
        assert sorted(answer.text for answer in answers) == ["", "ok", "ok"]
        assert [submit.seq for submit in stack.worker.submits] == [1, 2, 3]


async def test_waiting_versions_are_named_most_urgent_first(model: Path) -> None:
    async with router_stack(
        model, worker={"submit_limit": 0}, store=store_with(b"a", b"b", b"c")
    ) as stack:
        calls = []
        for version in (b"b", b"c", b"b", b"a"):
            calls.append(asyncio.ensure_future(stack.stream(spec_of(version))))
            await until(lambda: len(stack.running.router._active) == len(calls))
        await stack.worker.until(lambda: [b"b", b"c", b"a"] in stack.worker.prefetches)
        stack.worker.reply = lambda submit: OK
        stack.worker.raise_submit_limit(4)
        await asyncio.gather(*calls)
        await stack.worker.until(lambda: stack.worker.prefetches[-1] == [])


async def test_a_resident_adapter_draws_its_requests(model: Path) -> None:
    async with router_stack(
        model, reply=lambda submit: OK, num_workers=2, store=store_with(b"a")
    ) as stack:
        first, second = stack.workers
        residency = worker_service_pb2.Residency(snapshot=True, gpu_added=[b"a"])
        second.send(worker_service_pb2.AttachResponse(residency=residency))
        dispatcher = stack.running.router._dispatcher
        await until(lambda: any(worker.gpu for worker in dispatcher.workers))
        for _ in range(3):
            await stack.stream(spec_of(b"a"))
        assert (len(first.submits), len(second.submits)) == (0, 3)


async def test_load_is_spread_over_workers(model: Path) -> None:
    async with router_stack(model, num_workers=2) as stack:
        calls = [asyncio.ensure_future(stack.stream(SPEC)) for _ in range(8)]
        await until(lambda: sum(len(worker.submits) for worker in stack.workers) == 8)
        assert [len(worker.submits) for worker in stack.workers] == [4, 4]
        for worker in stack.workers:
            for seq in list(worker.active):
                worker.finish(seq, LENGTH)
        await asyncio.gather(*calls)


# Lost workers


@pytest.mark.parametrize("how", ["ends the stream", "falls silent"])
async def test_a_request_without_tokens_is_submitted_again(model: Path, how: str) -> None:
    async with router_stack(model, worker_silence_s=0.5, worker_wait_s=10) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        stack.worker.reply = lambda submit: OK
        if how == "falls silent":
            stack.worker.silent = True
            await until(lambda: len(stack.worker.hellos) == 2)
            stack.worker.silent = False
        else:
            stack.worker.end_stream()
        assert (await call).text == "ok"
        first, second = stack.worker.submits
        assert second.seq == 1, "a new stream counts anew"
        assert (second.request_id, second.token_ids) == (first.request_id, first.token_ids)
        stack.check_idle()


@pytest.mark.parametrize("num_drawn", [1, 3, 6])
async def test_a_stream_goes_on_elsewhere_without_a_gap_or_a_repeat(
    model: Path, num_drawn: int
) -> None:
    text = "aé€zyx"  # so that the loss also falls within characters
    token_ids = tokens_of(text)
    async with router_stack(model, num_workers=2, worker_wait_s=10) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await until(lambda: any(worker.submits for worker in stack.workers))
        first, second = sorted(stack.workers, key=lambda worker: not worker.submits)
        second.reply = lambda submit: Reply(token_ids)
        first.draw(1, *token_ids[:num_drawn])
        await sent(stack, num_drawn)
        first.end_stream()
        answer = await call
        (again,) = second.submits
        stack.check_idle()
    assert (answer.text, answer.token_ids) == (text, token_ids)
    assert list(again.token_ids) == [*first.submits[0].token_ids, *token_ids[:num_drawn]]
    assert again.generated_tokens == num_drawn
    assert again.sampling == first.submits[0].sampling, "the seed is kept"
    assert again.max_tokens == first.submits[0].max_tokens
    assert answer.completed is not None
    assert answer.completed.usage.prompt_tokens == 2
    assert answer.completed.usage.completion_tokens == len(token_ids)


async def test_heartbeats_keep_an_idle_stream(model: Path) -> None:
    async with router_stack(model, worker_silence_s=0.5) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        await asyncio.sleep(1.2)
        stack.worker.finish(1, LENGTH)
        await call
        assert len(stack.worker.hellos) == 1


async def test_a_message_that_does_not_fit_together_costs_its_worker_alone(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model, num_workers=2, worker_wait_s=60) as stack:
        calls = [asyncio.ensure_future(stack.stream(SPEC)) for _ in range(2)]
        await until(lambda: all(worker.submits for worker in stack.workers))
        bad, good = stack.workers
        good.draw(1, *tokens_of("a"))
        bad.reply = good.reply = lambda submit: OK
        bad.step(seqs=[1, 1], token_ids=tokens_of("o"))
        await until(lambda: len(bad.hellos) == 2)
        good.draw(1, *tokens_of("b"))
        good.finish(1, LENGTH)
        assert sorted([(await call).text for call in calls]) == ["ab", "ok"]
        assert len(good.hellos) == 1
        stack.check_idle()
    [record] = [r for r in caplog.records if "cannot be taken" in r.getMessage()]
    expected = f"worker {bad.address}: what was sent on its stream cannot be taken: ValueError"
    assert expected in record.getMessage()
    assert record.exc_info is not None


async def test_a_submit_that_cannot_be_written_ends_the_stream_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect, since what is submitted was checked before."""
    failures = [ValueError("out of range")]

    def to_submit(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return worker_messages.to_submit(*arguments)

    monkeypatch.setattr(worker_link, "to_submit", to_submit)
    async with router_stack(model, worker_silence_s=60, worker_wait_s=60) as stack:
        stack.worker.reply = lambda submit: OK
        assert (await stack.stream(SPEC)).text == "ok"
        assert len(stack.worker.hellos) == 2
        stack.check_idle()
    assert "cannot be taken: ValueError out of range" in caplog.text


async def test_requests_that_a_worker_gives_back_are_looked_at_together(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_requests, num_looks = 40, 0
    async with router_stack(model) as stack:
        calls = [asyncio.ensure_future(stack.stream(SPEC)) for _ in range(num_requests)]
        await submitted(stack, num_requests)
        dispatcher = stack.running.router._dispatcher
        stranded = dispatcher.stranded

        def look() -> list[Request]:
            nonlocal num_looks
            num_looks += 1
            return stranded()

        monkeypatch.setattr(dispatcher, "stranded", look)
        given_back = to_status(Draining("the worker is draining"))
        seqs = list(stack.worker.active)
        stack.worker.active.clear()
        stack.worker.step(
            finished=[
                worker_service_pb2.Finished(seq=seq, reason=ABORTED, error=given_back)
                for seq in seqs
            ]
        )
        errors = [await error_of(call) for call in calls]
        assert {type(error) for error in errors} == {NoWorker}
        assert 1 < num_looks < 10
        stack.check_idle()


async def test_late_tokens_of_a_lost_stream_are_ignored(model: Path) -> None:
    async with router_stack(model, worker_wait_s=10) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        stack.worker.end_stream()
        stack.worker.draw(1, *tokens_of("late"))
        await submitted(stack, 2)
        stack.worker.draw(1, *tokens_of("new"))
        stack.worker.finish(1, LENGTH)
        assert (await call).text == "new"


async def test_a_third_loss_ends_the_request(model: Path) -> None:
    async with router_stack(model, worker_wait_s=10) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        stack.worker.draw(1, *tokens_of("ab"))
        await sent(stack, 2)
        for turn in range(3):
            await submitted(stack, turn + 1)
            stack.worker.end_stream()
        error = await error_of(call)
        assert isinstance(error, WorkerLost)
        assert error.metadata == {"sentTokens": "2"}
        await stack.until_health(ready=True)
        stack.worker.reply = lambda submit: OK
        assert (await stack.stream(SPEC)).text == "ok"
        assert stack.worker.cancels == [], "a seq of an old stream means nothing on the new one"
        stack.check_idle()


@pytest.mark.parametrize("num_drawn", [0, 2])
async def test_without_another_worker_a_request_is_given_up_soon(
    model: Path, num_drawn: int
) -> None:
    async with router_stack(model, worker_wait_s=0.2) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        if num_drawn:
            stack.worker.draw(1, *tokens_of("ab"))
            await sent(stack, num_drawn)
        stack.worker.model_digest = b"other"  # so that it cannot attach again
        stack.worker.end_stream()
        error = await error_of(call)
        if num_drawn:
            assert isinstance(error, WorkerLost)
            assert error.metadata == {"sentTokens": "2"}
        else:
            assert isinstance(error, NoWorker)
            assert error.retry_after_s is not None
        await stack.until_health(ready=False)
        assert isinstance(await error_of(stack.stream(SPEC)), NoWorker)
        stack.check_idle()


async def test_workers_that_come_and_go_do_not_prolong_the_wait(model: Path) -> None:
    """Others attach and leave all the time, and none may serve the request."""
    store = FakeStore()
    store.publish("tenants/default/adapters/big", b"v", rank=64)
    async with router_stack(model, num_workers=2, store=store, worker_wait_s=1) as stack:
        first, second = stack.workers
        second.max_rank = 8
        second.end_stream()
        await until(lambda: len(second.hellos) == 2)
        spec = pb.GenerationSpec(prompt="p", adapter="adapters/big")
        call = asyncio.ensure_future(stack.stream(spec))
        await submitted(stack, 1)
        first.failure = NoWorker("it loads")
        first.end_stream()
        while not call.done():
            second.end_stream()
            await asyncio.sleep(0.2)
        assert isinstance(await error_of(call), NoWorker)
        stack.check_idle()


async def test_generate_can_be_tried_again_since_nothing_was_sent(model: Path) -> None:
    async with router_stack(model, worker_wait_s=0.2) as stack:
        call = asyncio.ensure_future(stack.generate(SPEC))
        await submitted(stack, 1)
        stack.worker.draw(1, *tokens_of("ab"))
        stack.worker.model_digest = b"other"
        stack.worker.end_stream()
        assert isinstance(await error_of(call), NoWorker)


@pytest.mark.parametrize("by", ["max_tokens", "stop token", "stop string"])
async def test_a_complete_output_survives_its_worker(model: Path, by: str) -> None:
    """Only the worker's last word is missing."""
    stopping = common_pb2.StoppingOptions(
        max_tokens=3 if by == "max_tokens" else 9,
        stop_token_ids=tokens_of("c") if by == "stop token" else [],
        stop_strings=["c"] if by == "stop string" else [],
    )
    async with router_stack(model) as stack:
        call = asyncio.ensure_future(stack.stream(pb.GenerationSpec(prompt="p", stopping=stopping)))
        await submitted(stack, 1)
        worker = stack.worker
        del worker.active[1]  # so that the fake does not answer the Cancel of a stop string
        worker.draw(1, *tokens_of("abc"))
        worker.end_stream()
        answer = await call
        stack.check_idle()
    assert answer.token_ids == tokens_of("abc")
    assert answer.text == ("abc" if by == "max_tokens" else "ab")
    assert answer.completed is not None
    expected = {"max_tokens": None, "stop token": "stop_token_id", "stop string": "stop_string"}
    assert answer.completed.WhichOneof("matched_stop") == expected[by]


@pytest.mark.parametrize("reason", [ABORTED, CANCELLED])
async def test_what_a_worker_gives_back_goes_elsewhere(model: Path, reason: Any) -> None:
    async with router_stack(model, num_workers=2, worker_wait_s=10) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await until(lambda: any(worker.submits for worker in stack.workers))
        first, second = sorted(stack.workers, key=lambda worker: not worker.submits)
        second.reply = lambda submit: Reply(tokens_of("abcd"))
        first.draw(1, *tokens_of("ab"))
        first.draining = True
        first.finish(1, reason, Draining("leaving") if reason == ABORTED else None)
        if reason == CANCELLED:
            first.reply = second.reply
        answer = await call
        assert answer.text == "abcd"
        stack.check_idle()


async def test_what_becomes_unavailable_in_mid_stream_is_submitted_again(model: Path) -> None:
    async with router_stack(model, worker_wait_s=10) as stack:
        call = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack, 1)
        stack.worker.draw(1, *tokens_of("ab"))
        await sent(stack, 2)
        stack.worker.finish(1, ABORTED, StoreUnavailable("the adapter store is not available"))
        await submitted(stack, 2)
        assert stack.worker.submits[1].generated_tokens == 2
        stack.worker.draw(2, *tokens_of("c"))
        stack.worker.finish(2, LENGTH)
        assert (await call).text == "abc"


async def test_a_draining_worker_gets_nothing_new(model: Path) -> None:
    async with router_stack(model, num_workers=2, reply=lambda submit: OK) as stack:
        first, second = stack.workers
        first.draining = True
        dispatcher = stack.running.router._dispatcher
        await until(lambda: sum(worker.draining for worker in dispatcher.workers) == 1)
        for _ in range(4):
            await stack.stream(SPEC)
        assert (len(first.submits), len(second.submits)) == (0, 4)
        second.draining = True
        await stack.until_health(ready=False)
        assert isinstance(await error_of(stack.stream(SPEC)), NoWorker)


# Workers that cannot attach


async def test_without_a_worker_a_request_is_refused_with_a_hint(model: Path) -> None:
    other = {"model_digest": b"other"}
    async with router_stack(model, worker=other, wait=False) as stack:
        await until(lambda: bool(stack.worker.hellos))
        error = await error_of(stack.stream(SPEC))
        assert isinstance(error, NoWorker)
        assert error.retry_after_s is not None
        await stack.until_health(ready=False)


async def test_another_base_model_is_logged_as_an_error(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = {"model_digest": b"other"}
    async with router_stack(model, worker=other, wait=False) as stack:
        await until(lambda: len(stack.worker.hellos) >= 2, timeout_s=10)  # and it is tried again
        await stack.until_health(ready=False)
        messages = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert any("MODEL_MISMATCH" in message for message in messages)


async def test_a_worker_that_takes_any_router_is_refused_by_the_router(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with router_stack(model) as stack:
        stack.worker.hellos.clear()
        stack.worker.reply = lambda submit: OK
        stack.worker.accepts_any_model = True
        digest, stack.worker.model_digest = stack.worker.model_digest, b"other"
        stack.worker.end_stream()
        await until(lambda: len(stack.worker.hellos) >= 1)
        await stack.until_health(ready=False)
        assert b"other".hex() in caplog.text
        stack.worker.model_digest = digest
        await stack.until_health(ready=True)
        assert (await stack.stream(SPEC)).text == "ok"


async def test_a_worker_that_is_restarted_is_found(model: Path) -> None:
    async with router_stack(model, wait=False, worker={"reply": lambda submit: OK}) as stack:
        await stack.until_health(ready=True)
        restarted = FakeWorker(stack.worker.model_digest, reply=lambda submit: OK)
        await stack.stop_worker()
        await stack.until_health(ready=False)
        async with restarted.serving(stack.worker.port):
            await stack.until_health(ready=True)
            assert (await stack.stream(SPEC)).text == "ok"
        assert len(restarted.submits) == 1


async def test_failed_attempts_leave_no_task_behind(model: Path) -> None:
    other = {"model_digest": b"other"}
    async with router_stack(model, worker=other, wait=False) as stack:
        await until(lambda: len(stack.worker.hellos) == 1)
        num_tasks = len(asyncio.all_tasks())
        await until(lambda: len(stack.worker.hellos) == 4)
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) <= num_tasks + 1
