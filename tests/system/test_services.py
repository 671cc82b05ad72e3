"""A client's request through the real router, adapter store and worker, and what can go wrong."""

import asyncio
import itertools
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer

from demo import tasks
from lorry.client import Client, Request
from lorry.client.generation import Generation
from lorry.rpc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ContextLengthExceeded,
    DeadlineExpired,
    LorryError,
    PoolTooSmall,
)
from tests.support import reflected
from tests.support.adjusted_draws import drawn_adjusted
from tests.support.command import REPO
from tests.support.models import Reference
from tests.support.processes import DEMO_MODEL, Stack, ready
from tests.support.reflected import grpcurl_calls

ADAPTERS = ["reverse", "rot13", "double-letters"]
EXPECTED: list[dict[str, Any]] = json.loads((REPO / "demo" / "expected.json").read_text())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        await stack.start()
        await ready(stack.router.address)
        async with stack.client() as client:
            for adapter in ADAPTERS:
                await client.adapters.push(REPO / "demo" / "adapters" / adapter)
        yield stack
    finally:
        await stack.stop()


pytestmark = pytest.mark.asyncio(loop_scope="module")


def greedy(word: str, adapter: str = "", **fields: Any) -> Request:
    defaults: dict[str, Any] = {"max_tokens": 32}
    return Request(
        prompt=tasks.make_prompt(word), adapter=adapter, temperature=0.0, **(defaults | fields)
    )


async def check_serves(client: Client) -> None:
    """The next request succeeds."""
    answer = await client.generate(greedy("lorry", "reverse"), timeout_s=60)
    assert answer.text == "yrrol"


async def test_mixed_requests_answer_as_transformers_and_peft_do(stack: Stack) -> None:
    wanted = [r for r in EXPECTED if r["adapter"] in ["", *ADAPTERS]]
    assert len(wanted) > 60
    async with stack.client() as client:
        for adapter in ADAPTERS:  # so that none is still being loaded when the base is done
            await client.generate(greedy("lorry", adapter))
        answers = await asyncio.gather(
            *(
                client.generate(
                    Request(
                        prompt=request["prompt"],
                        adapter=request["adapter"],
                        max_tokens=request["max_tokens"],
                        temperature=0.0,
                    )
                )
                for request in wanted
            )
        )
    assert [list(a.token_ids) for a in answers] == [r["token_ids"] for r in wanted]
    assert [a.text for a in answers] == [r["text"] for r in wanted]
    status = await stack.idle()
    assert status.max_adapters_beside_base_in_step == len(ADAPTERS)


async def test_streamed_text_is_the_whole_text(stack: Stack) -> None:
    async with (
        stack.client() as client,
        client.stream(greedy("transport", "double-letters")) as stream,
    ):
        text = "".join([chunk.text async for chunk in stream])
        assert text == "ttrraannssppoorrtt"
        assert stream.completion is not None
        assert stream.completion.adapter == "tenants/default/adapters/double-letters"


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.25, "prompt_logprobs": 0},
    {
        "temperature": 1.0,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "logit_bias": {5: 1.5, 9: -100.0},
        "prompt_logprobs": 2,
    },
    {"temperature": 0.0, "stop_token_ids": [*range(3, 40)], "min_tokens": 16},
]


async def test_draws_and_logprobs_are_those_of_transformers_and_peft(
    stack: Stack,
) -> None:
    prompts = [tasks.make_prompt(word) for word in ("lorry", "transport")]
    cases = list(itertools.product(prompts, ["", *ADAPTERS], SAMPLING))
    async with stack.client() as client:
        answers = await asyncio.gather(
            *(
                client.generate(
                    Request(
                        prompt=prompt,
                        adapter=adapter,
                        max_tokens=16,
                        ignore_eos=True,
                        seed=seed,
                        top_logprobs=3,
                        **sampling,
                    )
                )
                for seed, (prompt, adapter, sampling) in enumerate(cases)
            )
        )
    reference = Reference(DEMO_MODEL)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    for seed, ((prompt, adapter, sampling), answer) in enumerate(zip(cases, answers, strict=True)):
        ids, tokens = tokenizer.encode(prompt).ids, list(answer.token_ids)
        path = REPO / "demo" / "adapters" / adapter if adapter else None
        all_logits = reference.logits([*ids, *tokens], path)[:-1]
        logits = all_logits[len(ids) - 1 :]
        assert tokens == drawn_adjusted(logits, sampling, ids, tokens, seed)
        check_prompt_logprobs(answer, ids, all_logits, sampling.get("prompt_logprobs"))
        logprobs = logits.log_softmax(dim=1)
        top = logprobs.topk(3).indices.tolist()
        for place, token in enumerate(answer.logprobs):
            assert token.token_id == tokens[place]
            reported = dict(token.top) | {token.token_id: token.logprob}
            assert list(dict(token.top)) == top[place]
            expected = {token_id: float(logprobs[place, token_id]) for token_id in reported}
            assert reported == pytest.approx(expected, abs=1e-3)
        assert len(answer.logprobs) == len(tokens) == 16


def check_prompt_logprobs(
    answer: Generation, ids: list[int], logits: torch.Tensor, asked: int | None
) -> None:
    rows = answer.prompt_logprobs
    assert [row.token_id for row in rows] == ([] if asked is None else ids[1:])
    for row, logprobs in zip(rows, logits.log_softmax(dim=1), strict=False):
        assert row.logprob == pytest.approx(float(logprobs[row.token_id]), abs=1e-3)
        assert [token_id for token_id, _ in row.top] == logprobs.topk(asked or 0).indices.tolist()


async def test_streamed_tokens_have_logprobs_where_asked_for(stack: Stack) -> None:
    request = greedy("transport", "double-letters", top_logprobs=0)
    async with stack.client() as client, client.stream(request) as stream:
        chunks = [chunk async for chunk in stream]
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    reported = [token for chunk in chunks for token in chunk.logprobs]
    assert [token.token_id for token in reported] == token_ids
    assert all(-1 < token.logprob <= 0 and not token.top for token in reported)


async def test_the_calls_of_the_docs_by_grpcurl_need_reflection_alone(stack: Stack) -> None:
    generation, listing = grpcurl_calls((REPO / "docs" / "clients.md").read_text())
    streamed = list(reflected.answers(stack.router.address, generation))
    text = "".join(each["chunk"].get("text", "") for each in streamed if "chunk" in each)
    assert text == "ananab"
    assert streamed[-1]["completed"]["adapter"] == "tenants/default/adapters/reverse"
    [listed] = reflected.answers(stack.store.address, listing)
    assert {each["name"].rpartition("/")[2] for each in listed["adapters"]} >= set(ADAPTERS)


async def test_unknown_adapter_is_not_found(stack: Stack) -> None:
    async with stack.client() as client:
        with pytest.raises(AdapterNotFound, match="tenants/default/adapters/missing"):
            await client.generate(greedy("lorry", "missing"))
        await check_serves(client)


async def test_malformed_adapter_is_refused_by_name(stack: Stack, tmp_path: Path) -> None:
    source = REPO / "demo" / "adapters" / "reverse"
    config = json.loads((source / "adapter_config.json").read_text())
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    weights = (source / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(weights)
    async with stack.client() as client:
        with pytest.raises(AdapterInvalid, match="use_dora"):
            await client.adapters.push(bad)
        (bad / "adapter_config.json").write_text(json.dumps(config))
        (bad / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(AdapterInvalid):
            await client.adapters.push(bad)
        with pytest.raises(AdapterNotFound):
            await client.generate(greedy("lorry", "bad"))
        await check_serves(client)


async def test_impossible_request_is_refused(stack: Stack) -> None:
    async with stack.client() as client:
        with pytest.raises(ContextLengthExceeded, match="max_tokens"):
            await client.generate(greedy("lorry", max_tokens=100_000))
        await check_serves(client)


async def test_client_that_leaves_frees_everything(stack: Stack) -> None:
    async with stack.client() as client:
        long = greedy("lorry", "reverse", max_tokens=900, ignore_eos=True)
        async with client.stream(long) as stream:
            await anext(aiter(stream))
            assert (await stack.worker_status()).pages_total > 0
        await stack.idle()
        await check_serves(client)


async def test_deadline_ends_a_request_in_mid_stream(stack: Stack) -> None:
    async with stack.client() as client:
        with pytest.raises(DeadlineExpired):
            await client.generate(
                greedy("lorry", "reverse", max_tokens=1000, ignore_eos=True), timeout_s=0.3
            )
        await stack.idle()
        await check_serves(client)


async def test_pushed_adapter_can_be_called_at_once(stack: Stack) -> None:
    async with stack.client() as client:
        await client.adapters.push(REPO / "demo" / "adapters" / "uppercase")
        answer = await client.generate(greedy("lorry", "uppercase"))
        assert answer.text == "LORRY"
        await client.adapters.delete("uppercase")


async def test_killed_worker_is_replaced_and_serves_again(stack: Stack) -> None:
    address = stack.worker.address
    async with stack.client() as client:
        long = greedy("lorry", "reverse", max_tokens=400, ignore_eos=True)
        async with client.stream(long) as stream:
            chunks = aiter(stream)
            tokens = len((await anext(chunks)).token_ids)
            stack.worker.kill()
            await stack.worker.wait()
            restart = asyncio.create_task(stack.worker.start(address))
            tokens += sum([len(chunk.token_ids) async for chunk in chunks])
            assert tokens == 400  # resumed on the worker's next life
            await restart
        await ready(stack.router.address)
        await check_serves(client)


async def test_killed_engine_ends_the_worker(stack: Stack) -> None:
    address = stack.worker.address
    [engine] = psutil.Process(stack.worker.pid).children()
    engine.kill()
    assert await stack.worker.wait() != 0
    async with stack.client() as client:
        with pytest.raises(LorryError) as failure:
            await client.generate(greedy("lorry"), timeout_s=2)
        assert failure.value.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        await stack.worker.start(address)
        await ready(stack.router.address)
        await check_serves(client)


async def test_sigterm_drains_the_router_and_exits_with_0(stack: Stack) -> None:
    async with stack.client() as client:
        long = greedy("lorry", "reverse", max_tokens=300, ignore_eos=True)
        async with client.stream(long) as stream:
            chunks = aiter(stream)
            tokens = len((await anext(chunks)).token_ids)
            stack.router.kill(signal.SIGTERM)
            tokens += sum([len(chunk.token_ids) async for chunk in chunks])
            assert tokens == 300
            assert stream.completion is not None
    assert await stack.router.wait() == 0
    await stack.router.start(stack.router.address)
    await ready(stack.router.address)
    async with stack.client() as client:
        await check_serves(client)


async def test_sigterm_drains_worker_and_store_and_leaves_no_shared_memory(stack: Stack) -> None:
    for service in (stack.worker, stack.store):
        service.kill(signal.SIGTERM)
        assert await service.wait() == 0
    left = [path.name for path in (stack.directory / "shm").rglob("*") if path.is_file()]
    assert [name for name in left if not name.endswith(".lock")] == []
    for service in (stack.store, stack.worker):
        await service.start(service.address)
    await ready(stack.router.address)
    async with stack.client() as client:
        await check_serves(client)


async def test_request_larger_than_the_pool_is_refused(tmp_path: Path) -> None:
    stack = Stack(tmp_path, "--pool-pages", "30")
    try:
        await stack.start()
        await ready(stack.router.address)
        async with stack.client() as client:
            with pytest.raises(PoolTooSmall, match="pages"):
                await client.generate(greedy("lorry", max_tokens=600))
            assert (await client.generate(greedy("lorry"))).text == "lorry"
    finally:
        await stack.stop()
