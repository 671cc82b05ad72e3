"""Processes of streams that fetch page images through shared memory: the load of `store_mixed`.

A fetch is a call, the handle, the map, the end of the call.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.store import REPO
from lorry.rpc.shared_memory import open_shared, shm_namespace_id
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1.adapter_data_service_pb2_grpc import AdapterDataServiceStub

PROCESSES, STREAMS = 8, 25


@dataclass(frozen=True, slots=True)
class Place:
    """What to fetch and where, for a command line: bytes are hexadecimal."""

    address: str
    shm_dir: str
    layout: str
    versions: list[str]


class Reader:
    """One process's streams."""

    def __init__(self, place: Place) -> None:
        self._stub = AdapterDataServiceStub(grpc.aio.insecure_channel(place.address))
        self._shm_dir = Path(place.shm_dir)
        self._requests = [
            data_pb.FetchAdapterRequest(
                version=bytes.fromhex(version),
                layout=data_pb.PageLayout.FromString(bytes.fromhex(place.layout)),
                accepted_transports=[data_pb.TRANSPORT_SHM],
                shm_namespace_id=shm_namespace_id(self._shm_dir),
            )
            for version in place.versions
        ]

    async def fetch(self, number: int) -> None:
        call: Any = self._stub.FetchAdapter(self._requests[number % len(self._requests)])
        await call.read()
        handle = (await call.read()).shm
        open_shared(self._shm_dir, handle.name, handle.bytes).release()
        call.cancel()

    async def flood(self, seconds: float) -> list[float]:
        """Each stream fetches again and again; seconds of each fetch."""
        end_s = time.monotonic() + seconds
        found: list[float] = []

        async def stream(number: int) -> None:
            while (begun_s := time.monotonic()) < end_s:
                await self.fetch(number)
                found.append(time.monotonic() - begun_s)

        await asyncio.gather(*(stream(number) for number in range(STREAMS)))
        return found

    async def pace(self, seconds: float, period_s: float) -> list[float]:
        """Each stream fetches once in a period; seconds from when each fetch was due."""
        begun_s = time.monotonic()
        found: list[float] = []

        async def stream(number: int) -> None:
            due_s = begun_s + period_s * number / STREAMS
            while due_s < begun_s + seconds:
                await asyncio.sleep(due_s - time.monotonic())
                await self.fetch(number)
                found.append(time.monotonic() - due_s)
                due_s += period_s

        await asyncio.gather(*(stream(number) for number in range(STREAMS)))
        return found


async def read_orders(place: Place) -> None:
    """Serve lines of standard input; each answer is a line of JSON."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # not as the parent
    reader = Reader(place)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        seconds, period_s = json.loads(line)
        found = await (reader.pace(seconds, period_s) if period_s else reader.flood(seconds))
        print(json.dumps(found), flush=True)


class Readers:
    """The processes."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def run(self, seconds: float, period_s: float = 0.0) -> list[float]:
        """Seconds of all fetches; with a period, paced."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps([seconds, period_s])}\n".encode())
        answers = await asyncio.gather(*(_line(process) for process in self._processes))
        return [each for answer in answers for each in json.loads(answer)]


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()


@contextlib.asynccontextmanager
async def readers(place: Place) -> AsyncIterator[Readers]:
    command = [sys.executable, "-m", "benchmarks.store_readers", json.dumps(asdict(place))]
    processes = [
        await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 26,
            cwd=REPO,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for process in processes:
            assert await _line(process) == b"ready\n"
        yield Readers(processes)
    finally:
        for process in processes:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    asyncio.run(read_orders(Place(**json.loads(sys.argv[1]))))
