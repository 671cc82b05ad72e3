"""Logprobs of prompts on their way from workers to clients."""

import asyncio
from pathlib import Path

import pytest

from lorry.rpc.errors import LorryError, WorkerLost
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import tokens_of
from tests.support.fake_worker import LENGTH, FakeWorker
from tests.support.router_stack import Stack, error_of, router_stack
from tests.support.waiting import until

SPEC = pb.GenerationSpec(prompt="abcd", response=common_pb2.ResponseOptions(prompt_logprobs=1))
TOKENS = tokens_of("abcd")  # a first one begins the sequence


async def submitted(worker: FakeWorker, num_submits: int) -> None:
    await worker.until(lambda: len(worker.submits) == num_submits)


def answer_to(worker: FakeWorker, seq: int = 1) -> None:
    worker.draw(seq, *tokens_of("x"))
    worker.finish(seq, LENGTH)


async def sent_prompt(stack: Stack) -> None:
    """Wait until the only request's client has taken logprobs."""
    active = stack.running.router._active
    await until(lambda: [active.output(request).has_sent for request in active] == [True])


async def test_they_come_before_the_tokens_with_the_prompts_tokens(model: Path) -> None:
    async with router_stack(model) as stack:
        answer = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack.worker, 1)
        stack.worker.report_prompt(1, 1, -1, -2)
        stack.worker.report_prompt(1, 3, -3, -4)
        answer_to(stack.worker)
        parts = (await answer).prompt_logprobs
    assert stack.worker.submits[0].response.prompt_logprobs == 1
    assert not stack.worker.submits[0].response.HasField("top_logprobs")
    assert [logprob for part in parts for logprob in part.logprobs.logprobs] == [-1, -2, -3, -4]
    assert [token_id for part in parts for token_id in part.token_ids] == TOKENS
    assert [top for part in parts for top in part.logprobs.top_token_ids] == [9] * 4
    assert parts[0].first_index == 1


async def test_a_whole_answer_holds_them_all(model: Path) -> None:
    async with router_stack(model) as stack:
        answer = asyncio.ensure_future(stack.generate(SPEC))
        await submitted(stack.worker, 1)
        for index in range(1, 5):
            stack.worker.report_prompt(1, index, -index)
        answer_to(stack.worker)
        response = await answer
    assert list(response.prompt_logprobs.logprobs.logprobs) == [-1, -2, -3, -4]
    assert list(response.prompt_logprobs.token_ids) == TOKENS
    assert response.prompt_logprobs.first_index == 1
    assert response.text == "x"


async def test_who_does_not_ask_gets_none(model: Path) -> None:
    async with router_stack(model) as stack:
        answer = asyncio.ensure_future(stack.stream(pb.GenerationSpec(prompt="abcd")))
        await submitted(stack.worker, 1)
        stack.worker.report_prompt(1, 1, -1)
        answer_to(stack.worker)
        assert (await answer).prompt_logprobs == []
    assert not stack.worker.submits[0].response.HasField("prompt_logprobs")


async def test_another_worker_goes_on_where_the_lost_one_ended(model: Path) -> None:
    async with router_stack(model, worker_wait_s=10) as stack:
        answer = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack.worker, 1)
        stack.worker.report_prompt(1, 1, -1, -2, -3)
        await sent_prompt(stack)
        stack.worker.end_stream()
        await submitted(stack.worker, 2)
        stack.worker.report_prompt(1, 1, -1, -2)  # of a worker that begins anew
        stack.worker.report_prompt(1, 3, -3, -4)
        answer_to(stack.worker)
        parts = (await answer).prompt_logprobs
    assert [logprob for part in parts for logprob in part.logprobs.logprobs] == [-1, -2, -3, -4]
    assert [token_id for part in parts for token_id in part.token_ids] == TOKENS
    assert stack.worker.submits[1].response.prompt_logprobs == 1


async def test_what_is_complete_is_not_asked_for_again(model: Path) -> None:
    async with router_stack(model, worker_wait_s=10) as stack:
        answer = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack.worker, 1)
        stack.worker.report_prompt(1, 1, -1, -2, -3, -4)
        await sent_prompt(stack)
        stack.worker.end_stream()
        await submitted(stack.worker, 2)
        answer_to(stack.worker)
        await answer
    assert not stack.worker.submits[1].response.HasField("prompt_logprobs")


async def test_a_client_that_has_some_is_cut_off_when_no_worker_is_left(model: Path) -> None:
    """It must not try again, as it might if it had received nothing."""
    async with router_stack(model, worker_wait_s=0.2) as stack:
        answer = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack.worker, 1)
        stack.worker.report_prompt(1, 1, -1)
        await sent_prompt(stack)
        await stack.stop_worker()
        assert isinstance(await error_of(answer), WorkerLost)
        stack.check_idle()


@pytest.mark.parametrize("reported", [(), (1, -1.0, -2.0), (2, -2.0, -3.0, -4.0)])
async def test_a_worker_that_leaves_some_out_fails_the_request(
    model: Path, reported: tuple[float, ...]
) -> None:
    async with router_stack(model) as stack:
        answer = asyncio.ensure_future(stack.stream(SPEC))
        await submitted(stack.worker, 1)
        if reported:
            stack.worker.report_prompt(1, int(reported[0]), *reported[1:])
        stack.worker.draw(1, *tokens_of("x"))
        error = await error_of(answer)
        assert "prompt" in str(error)
        assert type(error) is LorryError
        stack.check_idle()


async def test_a_client_that_does_not_read_them_ends_like_one_that_reads_no_tokens(
    model: Path,
) -> None:
    spec = pb.GenerationSpec(prompt="x" * 300, response=SPEC.response)
    async with router_stack(model, max_unsent_tokens=100) as stack:
        call = stack.open(spec)
        await submitted(stack.worker, 1)
        stack.worker.report_prompt(1, 1, *[-1.0] * 299)
        await stack.worker.until(lambda: stack.worker.cancels == [1])
        call.cancel()
