import asyncio
import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from lorry.client import ChatMessage, Client, Request
from lorry.client.generation import FinishReason, TokenLogprobs
from lorry.client.retry import RetryPolicy
from lorry.rpc.errors import (
    AdapterNotFound,
    DeadlineExpired,
    Draining,
    LorryError,
    NoWorker,
    QueueFull,
    RemoteError,
    Unauthenticated,
)
from lorry.rpc.identity import Authenticator, Caller, Role
from tests.support.scripted import ScriptedInference, serving_scripted

IMPATIENT = RetryPolicy(attempts=3, first_delay_s=0.001, max_delay_s=0.002)
ONCE = RetryPolicy(attempts=1)
PROMPT = Request(prompt="a b c", max_tokens=3)


@asynccontextmanager
async def client_of(inference: ScriptedInference) -> AsyncIterator[Client]:
    async with (
        serving_scripted(inference=inference) as router,
        Client(router=router, retry=IMPATIENT) as client,
    ):
        yield client


async def collect(client: Client, request: Request, texts: list[str], **options: float) -> None:
    async with client.stream(request, **options) as stream:
        async for chunk in stream:
            texts.append(chunk.text)


async def test_generate_returns_text_tokens_and_completion() -> None:
    async with client_of(ScriptedInference()) as client:
        generation = await client.generate(Request(prompt="a b c", adapter="reverse"))
    assert (generation.text, generation.token_ids) == ("abc", (0, 1, 2))
    assert generation.completion.finish_reason is FinishReason.STOP
    assert generation.completion.matched_stop == 2
    assert generation.completion.completion_tokens == 3
    assert generation.completion.adapter == "tenants/default/adapters/reverse"


async def test_stream_yields_chunks_and_then_the_completion() -> None:
    async with client_of(ScriptedInference()) as client, client.stream(PROMPT) as stream:
        assert stream.completion is None
        chunks = [chunk async for chunk in stream]
    assert [(chunk.token_ids, chunk.text) for chunk in chunks] == [
        ((0,), "a"),
        ((1,), "b"),
        ((2,), "c"),
    ]
    assert stream.completion is not None
    assert stream.completion.finish_reason is FinishReason.STOP


async def test_leaving_a_stream_early_cancels_its_generation() -> None:
    inference = ScriptedInference(pause_after=1)
    async with client_of(inference) as client:
        async with client.stream(PROMPT) as stream:
            async for _ in stream:
                break
        await asyncio.wait_for(inference.ended.wait(), 10)


async def test_options_reach_the_router_as_given() -> None:
    inference = ScriptedInference()
    request = Request(
        prompt=[5, 6],
        adapter="tenants/acme/adapters/x",
        temperature=0,
        seed=0,
        top_k=4,
        logit_bias={5: -1.5},
        max_tokens=7,
        stop_strings=["\n"],
        stop_token_ids=[9],
    )
    async with client_of(inference) as client:
        await client.generate(request)
    (spec,) = inference.specs
    assert list(spec.token_ids.ids) == [5, 6]
    assert spec.adapter == "tenants/acme/adapters/x"
    assert spec.sampling.HasField("temperature")
    assert spec.sampling.HasField("seed")
    assert spec.sampling.top_k == 4
    assert dict(spec.sampling.logit_bias) == {5: -1.5}
    assert spec.stopping.max_tokens == 7
    assert list(spec.stopping.stop_strings) == ["\n"]
    assert list(spec.stopping.stop_token_ids) == [9]


ALTERNATIVES = ((70, -0.25), (71, -1.25))


@pytest.mark.parametrize(("asked", "top"), [(None, None), (0, ()), (2, ALTERNATIVES)])
async def test_logprobs_come_with_their_tokens(
    asked: int | None, top: tuple[tuple[int, float], ...] | None
) -> None:
    inference = ScriptedInference()
    request = Request(prompt="a b", top_logprobs=asked)
    expected = [] if top is None else [TokenLogprobs(0, -0.5, top), TokenLogprobs(1, -0.5, top)]
    async with client_of(inference) as client:
        assert list((await client.generate(request)).logprobs) == expected
        async with client.stream(request) as stream:
            streamed = [row async for chunk in stream for row in chunk.logprobs]
    assert streamed == expected


@pytest.mark.parametrize("asked", [None, 0, 2])
async def test_logprobs_of_the_prompt_come_before_the_first_chunk(asked: int | None) -> None:
    inference = ScriptedInference()
    request = Request(prompt="a b c", prompt_logprobs=asked)
    row = TokenLogprobs(9, -0.5, ALTERNATIVES if asked else ())
    expected = [] if asked is None else [row, row]
    async with client_of(inference) as client:
        assert list((await client.generate(request)).prompt_logprobs) == expected
        async with client.stream(request) as stream:
            assert (await anext(stream)).text == "a"
            assert stream.prompt_logprobs == expected


def test_options_that_are_not_given_are_left_to_the_router() -> None:
    spec = Request(prompt="a").to_proto()
    assert not spec.adapter
    for field in ("temperature", "top_p", "repetition_penalty", "seed"):
        assert not spec.sampling.HasField(field)
    assert not spec.stopping.HasField("max_tokens")
    assert not spec.response.HasField("top_logprobs")
    assert not spec.response.HasField("prompt_logprobs")
    assert not spec.slo.HasField("ttft")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt": "a", "max_tokens": -1}, "max_tokens must be 0 to 4294967295, got -1"),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens must be 0 to 4294967295, got -1"),
        ({"prompt": "a", "top_k": -5}, "top_k must be 0 to 4294967295, got -5"),
        ({"prompt": "a", "top_logprobs": -1}, "top_logprobs must be 0 to 4294967295, got -1"),
        (
            {"prompt": "a", "stop_token_ids": [7, -1]},
            "each id of stop_token_ids must be 0 to 4294967295, got -1",
        ),
        (
            {"prompt": "a", "logit_bias": {2**32: 1.0}},
            "each id of logit_bias must be 0 to 4294967295, got 4294967296",
        ),
        ({"prompt": [5, -1]}, "each id of prompt must be 0 to 4294967295, got -1"),
        ({"prompt": "a", "seed": -1}, "seed must be 0 to 18446744073709551615, got -1"),
        ({"prompt": "a", "slo_ttft_s": -1.0}, "slo_ttft_s must be positive and finite, got -1.0"),
        (
            {"prompt": "a", "slo_ttft_s": math.nan},
            "slo_ttft_s must be positive and finite, got nan",
        ),
        (
            {"prompt": "a", "slo_tpot_s": math.inf},
            "slo_tpot_s must be positive and finite, got inf",
        ),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_sent_is_named_with_its_value(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Request(**options)


def test_an_slo_is_sent_as_durations() -> None:
    slo = Request(prompt="a", slo_ttft_s=1.5, slo_tpot_s=0.05).to_proto().slo
    assert (slo.ttft.ToMilliseconds(), slo.tpot.ToMilliseconds()) == (1500, 50)


def test_a_chat_is_sent_as_messages() -> None:
    spec = Request(prompt=[ChatMessage("system", "be brief"), ChatMessage("user", "hi")]).to_proto()
    assert spec.WhichOneof("input") == "chat"
    assert [(m.role, m.content) for m in spec.chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]


async def test_unavailable_is_retried() -> None:
    inference = ScriptedInference(NoWorker("none yet"), Draining("going"))
    async with client_of(inference) as client:
        assert (await client.generate(PROMPT)).text == "abc"
    assert inference.script.calls == 3


async def test_unavailable_is_retried_before_the_first_token_of_a_stream() -> None:
    inference = ScriptedInference(NoWorker("none yet"))
    async with client_of(inference) as client, client.stream(PROMPT) as stream:
        assert "".join([chunk.text async for chunk in stream]) == "abc"
    assert inference.script.calls == 2


async def test_unavailable_after_the_first_token_is_never_retried() -> None:
    inference = ScriptedInference(break_after=1)
    texts: list[str] = []
    async with client_of(inference) as client:
        with pytest.raises(LorryError) as failure:
            await collect(client, PROMPT, texts)
    assert failure.value.code is grpc.StatusCode.UNAVAILABLE
    assert texts == ["a"]
    assert inference.script.calls == 1


async def test_attempts_are_bounded() -> None:
    inference = ScriptedInference(*[NoWorker("none")] * 10)
    async with client_of(inference) as client:
        with pytest.raises(NoWorker):
            await client.generate(PROMPT)
    assert inference.script.calls == IMPATIENT.attempts


@pytest.mark.parametrize(
    "error",
    [
        AdapterNotFound("adapter 'x' is not registered", adapter="x"),
        QueueFull("the queue is full", retry_after_s=0.25),
    ],
    ids=lambda error: error.reason,
)
async def test_other_errors_arrive_as_their_class_at_once(error: LorryError) -> None:
    inference = ScriptedInference(error)
    async with client_of(inference) as client:
        with pytest.raises(type(error), match=str(error)) as failure:
            await collect(client, PROMPT, [])
    assert failure.value.metadata == error.metadata
    assert failure.value.retry_after_s == error.retry_after_s
    assert inference.script.calls == 1


async def test_retries_stop_when_the_next_would_be_past_the_deadline() -> None:
    inference = ScriptedInference(*[NoWorker("none", retry_after_s=60)] * 3)
    async with client_of(inference) as client:
        with pytest.raises(NoWorker):
            await client.generate(PROMPT, timeout_s=5)
    assert inference.script.calls == 1


async def test_a_deadline_ends_a_stream_and_its_generation() -> None:
    inference = ScriptedInference(pause_after=1)
    texts: list[str] = []
    async with client_of(inference) as client:
        with pytest.raises(DeadlineExpired):
            await collect(client, PROMPT, texts, timeout_s=0.3)
        await asyncio.wait_for(inference.ended.wait(), 10)
    assert texts == ["a"]


async def test_the_next_router_is_asked_at_once_and_kept() -> None:
    going = ScriptedInference(*[Draining("going", retry_after_s=60)] * 9)
    other = ScriptedInference()
    async with (
        serving_scripted(inference=going) as first,
        serving_scripted(inference=other) as second,
        Client(router=f"{first}, {second}", retry=ONCE) as client,
    ):
        for _ in range(3):
            assert (await client.generate(PROMPT)).text == "abc"
        async with client.stream(PROMPT) as stream:
            assert "".join([chunk.text async for chunk in stream]) == "abc"
    assert (going.script.calls, other.script.calls) == (1, 4)


async def test_each_attempt_asks_every_router_and_the_last_error_is_told() -> None:
    first, second = (ScriptedInference(*[NoWorker(name)] * 9) for name in ("first", "second"))
    async with (
        serving_scripted(inference=first) as address,
        serving_scripted(inference=second) as other,
        Client(router=f"{address},{other}", retry=IMPATIENT) as client,
    ):
        with pytest.raises(NoWorker, match="second"):
            await client.generate(PROMPT)
    assert first.script.calls == second.script.calls == IMPATIENT.attempts


async def test_no_other_router_is_asked_after_the_first_token_or_of_other_errors() -> None:
    other = ScriptedInference()
    for inference in (ScriptedInference(break_after=1), ScriptedInference(QueueFull("full"))):
        async with (
            serving_scripted(inference=inference) as address,
            serving_scripted(inference=other) as second,
            Client(router=f"{address},{second}", retry=IMPATIENT) as client,
        ):
            with pytest.raises(LorryError):
                await collect(client, PROMPT, [])
    assert other.script.calls == 0


@pytest.mark.parametrize("router", ["", "a:1,", "a:1,a:1"])
async def test_routers_are_different_addresses(router: str) -> None:
    with pytest.raises(ValueError, match="router must be HOST:PORT, or different ones"):
        Client(router=router)


async def test_no_service_is_a_typed_error() -> None:
    async with Client(router="127.0.0.1:1", retry=RetryPolicy(attempts=1)) as client:
        with pytest.raises(RemoteError) as failure:
            await client.generate(PROMPT)
    assert failure.value.code is grpc.StatusCode.UNAVAILABLE


async def test_the_token_is_sent_with_each_call() -> None:
    caller = Caller("acme", frozenset({Role.INFER}))
    authenticator = Authenticator(lambda: {hashlib.sha256(b"secret").digest(): caller})
    async with (
        serving_scripted(inference=ScriptedInference(), authenticator=authenticator) as router,
        Client(router=router, token="secret") as client,
        Client(router=router) as stranger,
    ):
        assert (await client.generate(PROMPT)).text == "abc"
        with pytest.raises(Unauthenticated):
            await stranger.generate(PROMPT)
