"""Requests that end well, through the real router."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorry.rpc.errors import LorryError
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb
from tests.support.byte_model import BOS, CONTEXT_TOKENS, EOS, tokens_of
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import LENGTH, STOP, Reply
from tests.support.router_stack import router_stack

VERSION = bytes(range(32))


def says(text: str, reason: Any = LENGTH) -> Any:
    return lambda submit: Reply(tokens_of(text), reason)


async def test_tokens_are_streamed_then_completed(model: Path) -> None:
    async with router_stack(model, reply=says("héllo €")) as stack:
        answer = await stack.stream(pb.GenerationSpec(prompt="say"))
        stack.check_idle()
    assert answer.text == "héllo €"
    assert answer.token_ids == tokens_of("héllo €")
    assert answer.completed is not None
    assert answer.completed.finish_reason == LENGTH
    assert answer.completed.usage.prompt_tokens == 4
    assert answer.completed.usage.completion_tokens == len(tokens_of("héllo €"))
    assert answer.completed.usage.cached_tokens == 1


async def test_generate_answers_in_one_message(model: Path) -> None:
    async with router_stack(model, reply=says("all at once")) as stack:
        response = await stack.generate(pb.GenerationSpec(prompt="say", request_id="r-1"))
        stack.check_idle()
    assert response.text == "all at once"
    assert list(response.token_ids) == tokens_of("all at once")
    assert response.completed.request_id == "r-1"


async def test_generate_without_any_token_has_an_empty_text(model: Path) -> None:
    async with router_stack(model, reply=says("")) as stack:
        response = await stack.generate(pb.GenerationSpec(prompt="say"))
    assert response.text == ""
    assert response.completed.usage.completion_tokens == 0


async def test_the_worker_is_told_what_the_client_asked(model: Path) -> None:
    spec = pb.GenerationSpec(
        request_id="r-1",
        prompt="hé",
        sampling=common_pb2.SamplingParams(temperature=0.5, seed=7),
        stopping=common_pb2.StoppingOptions(max_tokens=9, min_tokens=3, stop_token_ids=[5, 4]),
    )
    async with router_stack(model, reply=says("x")) as stack:
        await stack.stream(spec)
        submit = stack.worker.submits[0]
    assert (submit.seq, submit.request_id, submit.tenant) == (1, "r-1", "default")
    assert list(submit.token_ids) == [BOS, *tokens_of("hé")]
    assert submit.generated_tokens == 0
    assert submit.sampling == common_pb2.SamplingParams(
        temperature=0.5, top_p=1, repetition_penalty=1, seed=7
    )
    assert (submit.max_tokens, submit.min_tokens) == (9, 3)
    assert list(submit.stop_token_ids) == [EOS, 4, 5]
    assert submit.version == b""
    assert 10e9 < submit.remaining.ToNanoseconds() < 25e9  # 20 s, less the way here


async def test_unset_options_are_resolved_by_the_router(model: Path) -> None:
    async with router_stack(model, reply=says("x")) as stack:
        for _ in range(2):
            await stack.stream(pb.GenerationSpec(token_ids=common_pb2.TokenIds(ids=[9, 9])))
        first, second = stack.worker.submits
    assert first.max_tokens == CONTEXT_TOKENS - 2
    assert first.sampling.temperature == 1
    assert first.sampling.HasField("seed")
    assert first.sampling.seed != second.sampling.seed


async def test_ignore_eos_leaves_only_the_clients_stop_tokens(model: Path) -> None:
    stopping = common_pb2.StoppingOptions(ignore_eos=True, stop_token_ids=[7])
    async with router_stack(model, reply=says("x")) as stack:
        await stack.stream(pb.GenerationSpec(prompt="p", stopping=stopping))
        assert list(stack.worker.submits[0].stop_token_ids) == [7]


async def test_a_stop_token_is_reported_and_has_no_text(model: Path) -> None:
    def reply(submit: Any) -> Reply:
        return Reply([*tokens_of("ab"), EOS], STOP)

    async with router_stack(model, reply=reply) as stack:
        answer = await stack.stream(pb.GenerationSpec(prompt="p"))
    assert answer.text == "ab"
    assert answer.token_ids == [*tokens_of("ab"), EOS]
    assert answer.completed is not None
    assert answer.completed.finish_reason == STOP
    assert answer.completed.stop_token_id == EOS
    assert answer.completed.usage.completion_tokens == 3


async def test_a_stop_string_ends_the_text_before_it_and_cancels_the_rest(model: Path) -> None:
    def reply(submit: Any) -> Reply:
        return Reply(tokens_of("one END two"), reason=None)  # goes on until it is cancelled

    stopping = common_pb2.StoppingOptions(stop_strings=["never", "END"])
    async with router_stack(model, reply=reply) as stack:
        answer = await stack.stream(pb.GenerationSpec(prompt="p", stopping=stopping))
        assert stack.worker.cancels == [1]
        stack.check_idle()
    assert answer.text == "one "
    assert answer.token_ids == tokens_of("one END")
    assert answer.completed is not None
    assert answer.completed.finish_reason == STOP
    assert answer.completed.stop_string == "END"
    assert answer.completed.usage.completion_tokens == len("one END")
    assert answer.completed.timings.prefill.ToMilliseconds() == 30


async def test_what_was_held_back_comes_with_the_end(model: Path) -> None:
    stopping = common_pb2.StoppingOptions(stop_strings=["END"])
    async with router_stack(model, reply=says("the EN")) as stack:
        answer = await stack.stream(pb.GenerationSpec(prompt="p", stopping=stopping))
        whole = await stack.generate(pb.GenerationSpec(prompt="p", stopping=stopping))
    assert answer.text == whole.text == "the EN"
    assert answer.completed is not None
    assert answer.completed.finish_reason == LENGTH


async def test_a_stop_string_does_not_count_before_min_tokens(model: Path) -> None:
    stopping = common_pb2.StoppingOptions(stop_strings=["b"], min_tokens=4)
    async with router_stack(model, reply=says("abcdeb!")) as stack:
        answer = await stack.stream(pb.GenerationSpec(prompt="p", stopping=stopping))
    assert answer.text == "abcde"


async def test_an_adapter_is_resolved_to_its_version(model: Path) -> None:
    store = FakeStore()
    store.publish("tenants/default/adapters/sql", VERSION)
    async with router_stack(model, reply=says("x"), store=store) as stack:
        answers = [
            await stack.stream(pb.GenerationSpec(prompt="p", adapter=name))
            for name in ("adapters/sql", "tenants/default/adapters/sql")
        ]
        assert [submit.version for submit in stack.worker.submits] == [VERSION, VERSION]
    for answer in answers:
        assert answer.completed is not None
        assert answer.completed.adapter == "tenants/default/adapters/sql"
        assert answer.completed.version == VERSION


async def test_timings_add_up(model: Path) -> None:
    async with router_stack(model, reply=says("x")) as stack:
        answer = await stack.stream(pb.GenerationSpec(prompt="p"))
    assert answer.completed is not None
    timings = answer.completed.timings
    assert timings.adapter_load.ToMilliseconds() == 20
    assert timings.prefill.ToMilliseconds() == 30
    assert 0 < timings.queue.ToNanoseconds() < timings.ttft.ToNanoseconds()


async def test_a_chat_goes_through_the_models_template(model: Path) -> None:
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=" hi ")])
    async with router_stack(model, reply=says("x")) as stack:
        await stack.stream(pb.GenerationSpec(chat=chat))
        assert list(stack.worker.submits[0].token_ids) == tokens_of("[user]hi\n[assistant]")


async def test_nothing_is_sent_before_the_first_token(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.open(pb.GenerationSpec(prompt="p"))
        await stack.worker.until(lambda: len(stack.worker.submits) == 1)
        headers = asyncio.ensure_future(call.initial_metadata())
        await asyncio.sleep(0.1)
        assert not headers.done()
        stack.worker.draw(1, *tokens_of("a"))
        await headers
        stack.worker.finish(1, LENGTH)
        assert call.cancel()


async def test_many_requests_run_at_once(model: Path) -> None:
    def reply(submit: Any) -> Reply:
        return Reply(tokens_of(f"answer to {submit.request_id}"))

    async with router_stack(model, reply=reply, worker={"submit_limit": 100}) as stack:
        specs = [pb.GenerationSpec(request_id=f"r{i}", prompt="p") for i in range(100)]
        answers = await asyncio.gather(*map(stack.stream, specs))
        stack.check_idle()
    assert [answer.text for answer in answers] == [f"answer to r{i}" for i in range(100)]


async def test_a_slow_client_gets_fewer_larger_chunks(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.open(pb.GenerationSpec(prompt="p"))
        await stack.worker.until(lambda: bool(stack.worker.submits))
        stack.worker.draw(1, *tokens_of("a" * 50))  # all in one step
        stack.worker.finish(1, LENGTH)
        responses = [response async for response in call]
    assert [len(r.chunk.token_ids) for r in responses[:-1]] == [50]


@pytest.mark.parametrize("service", ["readiness", "lorry.v1.InferenceService"])
async def test_health_tells_when_it_is_ready(model: Path, service: str) -> None:
    async with router_stack(model) as stack:
        health: Any = stack.channel.unary_unary("/grpc.health.v1.Health/Check")
        request = b"\x0a" + bytes([len(service)]) + service.encode()
        assert await health(request) == b"\x08\x01"


async def test_requests_above_the_size_limit_are_refused_by_grpc(model: Path) -> None:
    async with router_stack(model) as stack:
        call = stack.stub.Generate(
            pb.GenerateRequest(spec=pb.GenerationSpec(prompt="x" * 3_000_000))
        )
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


SAMPLING = common_pb2.SamplingParams(
    temperature=0.5,
    top_k=5,
    top_p=0.5,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=-1,
    frequency_penalty=0.5,
    logit_bias={7: -100, 8: 0.5},
)
LOGPROBS: dict[str, Any] = {
    "logprobs": [-0.25, 0, -1.5],
    "top_counts": [2, 0, 2],
    "top_token_ids": [8, 9, 10, 11],
    "top_logprobs": [-0.25, -2, -0.5, -0.75],
}


async def test_logprobs_reach_the_client_that_asked_and_no_other(model: Path) -> None:
    asking = pb.GenerationSpec(
        prompt="p",
        sampling=SAMPLING,
        response=common_pb2.ResponseOptions(top_logprobs=2),
    )
    async with router_stack(model, worker={"submit_limit": 9}) as stack:
        answers = [asyncio.ensure_future(stack.stream(asking))]
        await stack.worker.until(lambda: len(stack.worker.submits) == 1)
        answers += [asyncio.ensure_future(stack.stream(pb.GenerationSpec(prompt="q")))]
        await stack.worker.until(lambda: len(stack.worker.submits) == 2)
        stack.worker.step(seqs=[1, 2, 1], token_ids=tokens_of("abc"), **LOGPROBS)
        for seq in (1, 2):
            stack.worker.finish(seq, LENGTH)
        first, second = await asyncio.gather(*answers)
    asked, other = stack.worker.submits
    assert asked.response.top_logprobs == 2
    asked.sampling.ClearField("seed")
    assert asked.sampling == SAMPLING
    assert not other.response.HasField("top_logprobs")
    assert not second.chunks[0].HasField("logprobs")
    (chunk,) = first.chunks
    assert list(chunk.logprobs.logprobs) == [-0.25, -1.5]
    assert list(chunk.logprobs.top_counts) == [2, 2]
    assert list(chunk.logprobs.top_token_ids) == [8, 9, 10, 11]
    assert list(chunk.logprobs.top_logprobs) == [-0.25, -2, -0.5, -0.75]


async def test_a_whole_answer_has_the_logprobs_of_all_tokens(model: Path) -> None:
    spec = pb.GenerationSpec(prompt="p", response=common_pb2.ResponseOptions(top_logprobs=0))
    async with router_stack(model) as stack:
        answer = asyncio.ensure_future(stack.generate(spec))
        await stack.worker.until(lambda: bool(stack.worker.submits))
        for logprob in (-0.5, -2):
            stack.worker.draw(1, *tokens_of("a"), logprobs=[logprob])
        stack.worker.finish(1, LENGTH)
        response = await answer
    assert list(response.logprobs.logprobs) == [-0.5, -2]
    assert not response.logprobs.top_counts


async def test_a_worker_that_leaves_out_logprobs_fails_the_request(model: Path) -> None:
    spec = pb.GenerationSpec(prompt="p", response=common_pb2.ResponseOptions(top_logprobs=0))
    async with router_stack(model, reply=says("a")) as stack:
        with pytest.raises(LorryError, match="without its logprobs"):
            await stack.stream(spec)
        stack.check_idle()
