"""A name gets a new version while requests of the old one run."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from lorry.client import Client, Request
from lorry.client.generation import Completion
from tests.support.command import REPO
from tests.support.models import Reference, first_difference
from tests.support.processes import DEMO_MODEL, Stack, ready

OLD, NEW = (REPO / "demo" / "adapters" / name for name in ("rot13", "double-letters"))
PROMPT = np.random.default_rng(0).integers(5, 50, 41).tolist()
MAX_TOKENS = 600
CACHED = 32  # of the prompt: its full pages


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path)
    try:
        await stack.start()
        await ready(stack.router.address)
        yield stack
    finally:
        await stack.stop()


@dataclass
class Stream:
    """One request, and what it has got so far."""

    started: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: list[int] = field(default_factory=list)
    completion: Completion | None = None

    async def run(self, client: Client) -> None:
        request = Request(
            prompt=PROMPT,
            adapter="changing",
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
        )
        async with client.stream(request) as stream:
            async for chunk in stream:
                self.tokens += chunk.token_ids
                self.started.set()
            self.completion = stream.completion


async def start_four(client: Client, group: asyncio.TaskGroup) -> list[Stream]:
    """One that computes the prompt, and three that find it in the prefix cache."""
    streams = [Stream() for _ in range(4)]
    for stream in streams:
        group.create_task(stream.run(client))
        await stream.started.wait()
    return streams


async def test_requests_keep_the_version_and_the_prefixes_that_they_began_with(
    stack: Stack,
) -> None:
    async with asyncio.timeout(120), stack.client() as client:
        versions = [(await client.adapters.push(OLD, adapter_id="changing")).version]
        async with asyncio.TaskGroup() as group:
            old = await start_four(client, group)
            pushed = await client.adapters.push(NEW, adapter_id="changing", replace=True)
            versions.append(pushed.version)
            new = await start_four(client, group)
            assert all(stream.completion is None for stream in old)
    reference = Reference(DEMO_MODEL)
    for streams, directory, version in zip((old, new), (OLD, NEW), versions, strict=True):
        expected = reference.greedy(PROMPT, directory, MAX_TOKENS, eos=None)
        for stream in streams:
            assert stream.completion is not None
            assert stream.completion.version == version
            assert first_difference(expected, stream.tokens) is None
        cached = [s.completion.cached_tokens for s in streams if s.completion is not None]
        assert cached == [0, CACHED, CACHED, CACHED]
