"""Streams that a test reads to their end, while something happens to the services."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from lorry.client import Client, Request


async def streamed(client: Client, request: Request) -> list[int]:
    """The token ids of an answer."""
    async with client.stream(request, timeout_s=60) as stream:
        return [token_id async for chunk in stream for token_id in chunk.token_ids]


async def outputs(
    connect: Callable[[], AbstractAsyncContextManager[Client]],
    requests: Sequence[Request],
    disturb: Callable[[], Awaitable[None]] | None = None,
) -> list[list[int]]:
    """The token ids of all answers, which `disturb` meets in their midst."""
    first_tokens = asyncio.Semaphore(0)

    async def read(client: Client, request: Request) -> list[int]:
        token_ids = list[int]()
        async with client.stream(request, timeout_s=120) as stream:
            async for chunk in stream:
                if not token_ids:
                    first_tokens.release()
                token_ids += chunk.token_ids
        return token_ids

    async with connect() as client, asyncio.TaskGroup() as group:
        streams = [group.create_task(read(client, request)) for request in requests]
        for _ in streams:
            await first_tokens.acquire()
        if disturb is not None:
            assert not all(stream.done() for stream in streams)
            await disturb()
    return [stream.result() for stream in streams]
