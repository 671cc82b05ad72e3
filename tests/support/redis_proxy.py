"""Stands between a store and its Redis, and stops at each step that it is told to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha1

from lorry.adapter_store.redis_backend.scripts import SCRIPTS

NAMES = {sha1(text.encode()).hexdigest(): name for name, text in SCRIPTS.items()}
LIMIT_BYTES = 1 << 22
Observer = Callable[[str, bool], Awaitable[None]]
Writer = asyncio.StreamWriter


class Cut(Exception):
    """The connection ends here."""


async def _ignore(_step: str, _done: bool) -> None:
    pass


@dataclass
class RedisProxy:
    """`observer` is called with each command's name, a script's own, before Redis gets it and once
    it has answered; where it raises `Cut` nothing goes on."""

    port: int = 0
    observer: Observer = _ignore

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def pass_on(self, port: int, reader: asyncio.StreamReader, writer: Writer) -> None:
        """One connection: command by command, so that an answer belongs to its step."""
        with contextlib.suppress(Cut, OSError, asyncio.IncompleteReadError):
            async with _closing(writer):
                redis_reader, redis_writer = await asyncio.open_connection(
                    "127.0.0.1", port, limit=LIMIT_BYTES
                )
                async with _closing(redis_writer):
                    while True:
                        command, words = await _read_command(reader)
                        name = _name(words)
                        await self.observer(name, False)
                        redis_writer.write(command)
                        await redis_writer.drain()
                        answer = await _read_answer(redis_reader)
                        await self.observer(name, True)
                        writer.write(answer)
                        await writer.drain()


@contextlib.asynccontextmanager
async def running_proxy(redis_port: int) -> AsyncIterator[RedisProxy]:
    """On a free port, until the block ends."""
    proxy = RedisProxy()
    connections = set[asyncio.Task[None]]()

    def connected(reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.create_task(proxy.pass_on(redis_port, reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=LIMIT_BYTES)
    try:
        proxy.port = server.sockets[0].getsockname()[1]
        yield proxy
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


@contextlib.asynccontextmanager
async def _closing(writer: Writer) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _name(words: list[bytes]) -> str:
    command = words[0].decode().lower()
    return NAMES[words[1].decode()] if command == "evalsha" else command


async def _read_command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """A command as it came, and its first two words."""
    head = await reader.readuntil(b"\n")
    parts, words = [head], list[bytes]()
    for _ in range(int(head[1:])):
        length = await reader.readuntil(b"\n")
        word = await reader.readexactly(int(length[1:]) + 2)
        parts += [length, word]
        words.append(word[:-2] if len(words) < 2 else b"")
    return b"".join(parts), words


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\n")
    if head[:1] not in b"$*" or head[1:2] == b"-":
        return head
    count = int(head[1:])
    if head[:1] == b"$":
        return head + await reader.readexactly(count + 2)
    return head + b"".join([await _read_answer(reader) for _ in range(count)])
