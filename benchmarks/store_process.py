"""A store process of a benchmark, and what it tells of itself."""

import asyncio
import contextlib
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psutil

from lorry.rpc.renewed_channel import Metadata
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from tests.support.scrape import Scrape


@dataclass
class RunningStore:
    process: psutil.Process
    address: str
    channel: grpc.aio.Channel
    metrics_url: str
    start_s: float  # until it has answered

    def resident_mib(self) -> float:
        """Of the store itself; its builders and what it maps of others are not counted."""
        return float(self.process.memory_info().rss / 2**20)

    def metrics(self) -> Scrape:
        with urllib.request.urlopen(self.metrics_url, timeout=30) as answer:
            return Scrape(answer.read().decode())


@dataclass(frozen=True)
class Place:
    """Where a store keeps its things; the images are in shared memory."""

    directory: Path
    shm_dir: Path
    redis_url: str | None = None  # None: adapters are kept in the directory

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def backend(self) -> str:
        return self.redis_url or (self.directory / "adapters").as_uri()


@contextlib.asynccontextmanager
async def started(
    place: Place, *options: str, metadata: Metadata = ()
) -> AsyncIterator[RunningStore]:
    """A store on the adapters of `place`, ended by SIGTERM."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "lorry.adapter_store", "--address", "127.0.0.1:0"]
    command += ["--model", str(place.model), "--shm-dir", str(place.shm_dir)]
    command += ["--backend", place.backend, *options]
    log_path = place.directory / "log"
    with log_path.open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=log
        )
        try:
            assert process.stdout is not None
            address = (await process.stdout.readline()).decode().split()[-1]
            async with grpc.aio.insecure_channel(address) as channel:
                request = pb.ListAdaptersRequest(page_size=1)
                await AdapterServiceStub(channel).ListAdapters(request, metadata=metadata)
                answers_s = time.perf_counter() - start_s
                url = metrics_url(log_path.read_text())
                yield RunningStore(psutil.Process(process.pid), address, channel, url, answers_s)
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


def metrics_url(log: str) -> str:
    (url,) = (word for word in log.split() if word.startswith("http://127.0.0.1:"))
    return url.rstrip(".,")
