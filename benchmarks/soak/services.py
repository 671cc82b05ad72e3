"""The services under soak, as processes: one router, one store, two workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from lorry.client import Client
from lorry.client.retry import RetryPolicy
from tests.support.processes import DEMO_MODEL, Service, ready

NUM_WORKERS = 2
POOL_PAGES = 90  # of 16 tokens: adapters and sequences have to make room for each other
MAX_RUNNING = 8
RAM_BYTES = 3 << 20  # of page images: they have to make room for each other, too
CLIENT_STALL_S = 3.0
EACH_CALL_ONCE = RetryPolicy(attempts=1)  # so that calls can be counted


class Services:
    def __init__(self, directory: Path) -> None:
        self.shm = directory / "shm"
        self.logs = directory
        model = ["--model", str(DEMO_MODEL), "--metrics-address", "127.0.0.1:0"]
        shm = ["--shm-dir", str(self.shm)]
        self.store = Service(
            "adapter_store",
            directory / "store.log",
            *[*model, *shm, "--backend", f"file://{directory / 'adapters'}"],
            *["--ram-bytes", str(RAM_BYTES), "--builders", "1"],
        )
        options = [*model, *shm, "--local-dir", str(directory / "local"), "--threads", "1"]
        options += ["--pool-pages", str(POOL_PAGES), "--max-running", str(MAX_RUNNING)]
        self.workers = [
            Service("worker", directory / f"worker-{number}.log", *options, "--max-waiting", "4")
            for number in range(NUM_WORKERS)
        ]
        self.router = Service(
            "router",
            directory / "router.log",
            *[*model, "--client-stall-s", str(CLIENT_STALL_S), "--worker-wait-s", "30"],
        )

    @property
    def all(self) -> tuple[Service, ...]:
        return self.router, self.store, *self.workers

    async def start(self) -> None:
        await self.store.start()
        for worker in self.workers:
            worker.options += ("--store", self.store.address)
        await asyncio.gather(*(worker.start() for worker in self.workers))
        self.router.options += ("--store", self.store.address)
        for worker in self.workers:
            self.router.options += ("--worker", worker.address)
        await self.router.start()
        for service in self.all:
            await ready(service.address)

    async def stop(self) -> list[int]:
        """The exit statuses, of SIGTERM."""
        await asyncio.gather(*(service.stop() for service in self.all))
        return [await service.wait() for service in self.all]

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client(
            router=self.router.address, store=self.store.address, retry=EACH_CALL_ONCE
        ) as client:
            yield client
