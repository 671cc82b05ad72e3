"""A store process over Redis, and SIGKILL for either at a chosen step of an upload or a fetch.

Steps are what the store asks of Redis, seen from between them: the store and the Redis are the real
ones and know nothing of it. Each life of a store finishes what the one before it left, shows that
nothing acknowledged is lost and that all bytes are right, and then meets its own end.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
from crc32c import crc32c

from lorry.adapter_store.redis_backend import books
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.link import RedisLink
from lorry.adapter_store.redis_backend.scripts import SCRIPTS
from lorry.kernels.page_layout import MODULES, Dtype, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import LorryError, StoreUnavailable
from lorry.rpc.status import from_rpc
from lorry.rpc.weight_chunk import Chunk, upload_adapter
from lorry.v1 import adapter_service_pb2 as pb
from tests.support.adapter_store import Client, write_base_model
from tests.support.adapters import TINY, build_image, lora_config, lora_files, lora_tensors
from tests.support.command import child_environment
from tests.support.redis_proxy import Cut, RedisProxy, running_proxy
from tests.support.redis_server import RedisServer

CONFIG = lora_config(r=128, targets=MODULES)  # 1.5 MiB: a whole chunk in Redis, and a tail
LAYOUT = PageLayout(geometry=TINY, dtype=Dtype.FP32)
PIECE_BYTES = 512 << 10
WAIT_S = 60.0
# Of an upload, a publish and the first fetch; what a store does by itself at times is none.
UPLOAD_STEPS = ("create_upload", "append", "staged", "seal", "keep", "commit", "drop_upload")
FETCH_STEPS = ("read_content", "mget")


class Point(NamedTuple):
    """Right before a step, or once Redis has done it and before the store hears of it."""

    step: str
    number: int  # of the steps of this name
    done: bool
    victim: str = "store"  # or redis

    def __str__(self) -> str:
        when = "after" if self.done else "before"
        return f"{self.victim}, {when} {self.step} {self.number}"


@dataclass
class Work:
    """One adapter version to upload, and what its client was told so far."""

    seed: int
    upload_id: str = ""
    received_bytes: int = 0
    version: bytes = b""
    weights: bytes = field(init=False)
    image: bytes = field(init=False)

    def __post_init__(self) -> None:
        tensors = lora_tensors(CONFIG, seed=self.seed)
        self.weights = lora_files(CONFIG, tensors)[1]
        self.image = bytes(build_image(CONFIG, tensors, LAYOUT)[1])


class Trap:
    """Counts steps, and kills at one of them."""

    def __init__(self, proxy: RedisProxy) -> None:
        self.seen: list[str] = []
        self.point: Point | None = None
        self.sprung = asyncio.Event()
        self.kill: Any = None
        proxy.observer = self.observe

    def arm(self, point: Point | None, kill: Any) -> None:
        self.seen, self.point, self.kill = [], point, kill
        self.sprung.clear()

    async def observe(self, step: str, done: bool) -> None:
        if step not in UPLOAD_STEPS + FETCH_STEPS:
            return
        if not done:
            self.seen.append(step)
        here = self.point
        if here is None or (step, self.seen.count(step), done) != here[:3]:
            return
        self.point = None
        await asyncio.to_thread(self.kill)
        self.sprung.set()
        raise Cut


@contextlib.asynccontextmanager
async def store_process(
    directory: Path, redis_url: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    """``python -m lorry.adapter_store`` over a Redis, once it listens; killed on exit."""
    model = write_base_model(directory / "model")
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "lorry.adapter_store", "--address", "127.0.0.1:0"],
        *["--model", str(model), "--backend", redis_url, "--builders", "1"],
        *["--shm-dir", str(directory / "shm"), "--scratch-dir", str(directory)],
        env=child_environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            address = (await process.stdout.readline()).decode().split()[-1]
        async with grpc.aio.insecure_channel(address) as channel:
            yield process, Client(channel, read_base_model(model))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@dataclass
class Crashes:
    """Lives of stores, one after another, on one Redis."""

    directory: Path
    redis: RedisServer
    proxy: RedisProxy
    trap: Trap

    async def live(self, works: list[Work], point: Point | None) -> list[str]:
        """Finish and check all works but the last, then do that until `point`; its steps.

        Where Redis is the victim, the store goes on, and so does its client.
        """
        *left, work = works
        async with store_process(self.directory, self.proxy.url) as (process, client):
            self.trap.arm(None, None)
            for each in left:
                await until_done(client, each)
            assert self.problems() == []
            by_store = point is None or point.victim == "store"
            self.trap.arm(point, process.kill if by_store else self.restart_redis)
            if point is None or not by_store:
                await until_done(client, work)
            else:
                with contextlib.suppress(LorryError):
                    await do(client, work)
                    raise AssertionError(f"{point} was not reached")
                async with asyncio.timeout(WAIT_S):
                    assert await process.wait() == -signal.SIGKILL
            assert point is None or self.trap.sprung.is_set(), f"{point} was not reached"
            return self.trap.seen

    def restart_redis(self) -> None:
        self.redis.kill()
        self.redis.start()
        self.load_scripts()

    def load_scripts(self) -> None:
        """Else the first use of each would be two steps."""
        for text in SCRIPTS.values():
            self.redis.client.script_load(text)

    def problems(self) -> list[str]:
        """Chunks or contents without an owner, or counted wrong."""
        link = RedisLink(RedisAddress.parse(self.redis.url))
        try:
            return books.problems(link)
        finally:
            link.close()


@contextlib.asynccontextmanager
async def crashing(directory: Path, redis: RedisServer) -> AsyncIterator[Crashes]:
    async with running_proxy(redis.port) as proxy:
        crashes = Crashes(directory, redis, proxy, Trap(proxy))
        crashes.load_scripts()
        yield crashes


async def do(client: Client, work: Work) -> None:
    """Go on from what the client knows; raises LorryError when the store dies."""
    if not work.upload_id:
        etag = await _etag(client)
        work.upload_id = await client.begin("sql", CONFIG, work.weights, etag=etag)
    state = await client.upload(work.upload_id)
    assert state.received_bytes >= work.received_bytes, "acknowledged bytes are lost"
    work.received_bytes = state.received_bytes
    if not state.HasField("adapter"):
        half = len(work.weights) // 2
        if work.received_bytes < half:
            await _send(client, work, half)
        await _send(client, work, len(work.weights))  # the end, although no byte may be missing
        state = await client.upload(work.upload_id)
    assert not work.version or state.adapter.version == work.version, "a publish is lost"
    work.version = state.adapter.version
    adapter = await client.get("adapters/sql")
    assert work.version in {adapter.version, *await _versions(client)}
    assert await _fetch(client, work.version) == work.image, "wrong bytes"


async def until_done(client: Client, work: Work) -> None:
    """As a client does it that tries again while the store has no Redis."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await do(client, work)
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def _send(client: Client, work: Work, end: int) -> None:
    """Send up to `end`, and learn what of it has been acknowledged."""
    start = pb.UploadStart(upload_id=work.upload_id, offset=work.received_bytes)
    pieces = _pieces(work.weights, work.received_bytes, end)
    requests = [pb.UploadAdapterRequest(start=start), *pieces]
    try:
        await upload_adapter(client.channel)(iter(requests), timeout=WAIT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.OUT_OF_RANGE or end == len(work.weights):
            raise from_rpc(error) from error
    work.received_bytes = (await client.upload(work.upload_id)).received_bytes
    assert work.received_bytes == end


def _pieces(weights: bytes, start: int, end: int) -> Iterator[Chunk]:
    for offset in range(start, end, PIECE_BYTES):
        data = weights[offset : min(offset + PIECE_BYTES, end)]
        yield Chunk(offset, data, crc32c(data))


async def _fetch(client: Client, version: bytes) -> bytes:
    try:
        responses = [response async for response in client.fetch(version)]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error
    return b"".join(response.chunk.data for response in responses[1:])


async def _etag(client: Client) -> str:
    """Of the adapter; empty if there is none yet."""
    response = await client.call(client.adapters.ListAdapters, pb.ListAdaptersRequest())
    return response.adapters[0].etag if response.adapters else ""


async def _versions(client: Client) -> list[bytes]:
    request = pb.ListAdapterVersionsRequest(name="adapters/sql")
    response = await client.call(client.adapters.ListAdapterVersions, request)
    return [version.digest for version in response.versions]


def points_of(steps: list[str], *, victim: str) -> list[Point]:
    """All points of the steps that were seen in one life."""
    return [
        Point(step, number, done, victim)
        for step in dict.fromkeys(steps)
        for number in range(1, steps.count(step) + 1)
        for done in (False, True)
    ]
