"""Store, router and several workers as processes; the router finds the workers by a name."""

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import psutil

from lorry.client import Client
from lorry.client.probe import worker_status
from lorry.rpc.errors import LorryError
from lorry.v1.worker_service_pb2 import WorkerStatus
from tests.support.processes import DEMO_MODEL, Service, ready
from tests.support.waiting import until

NAME = "workers.test"
DNS_INTERVAL_S = 0.2
MAX_RUNNING = 8  # on each worker


class Fleet:
    def __init__(self, directory: Path, num_workers: int, *router: str) -> None:
        model = ["--model", str(DEMO_MODEL)]
        shm = ["--shm-dir", str(directory / "shm")]
        self.hosts = directory / "hosts.json"
        backend = ["--backend", f"file://{directory / 'adapters'}"]
        self.store = Service("adapter_store", directory / "store.log", *model, *shm, *backend)
        options = [*model, *shm, "--threads", "1", "--engine-silence-s", "2"]
        options += ["--pool-pages", "1000", "--max-running", str(MAX_RUNNING), "--max-waiting", "0"]
        self.workers = [
            Service("worker", directory / f"worker-{number}.log", *options)
            for number in range(num_workers)
        ]
        self.router = Service(
            "router",
            directory / "router.log",
            *[*model, "--dns-interval-s", str(DNS_INTERVAL_S), "--worker-silence-s", "2"],
            *router,
            module="tests.support.router_of_names",
        )

    async def start(self) -> None:
        await self.store.start()
        port = "0"
        for number, worker in enumerate(self.workers, start=1):
            worker.options += ("--store", self.store.address)
            await worker.start(f"127.0.0.{number}:{port}")
            port = worker.address.rpartition(":")[2]
        self.list(self.workers)
        os.environ["HOSTS_FILE"] = str(self.hosts)
        self.router.options += ("--store", self.store.address, "--worker", f"dns:///{NAME}:{port}")
        await self.router.start()
        await self.all_ready()

    async def stop(self) -> None:
        for service in (self.router, *self.workers, self.store):
            await service.stop()

    def list(self, workers: Iterable[Service]) -> None:
        """What the name stands for from now on."""
        hosts = [worker.address.rpartition(":")[0] for worker in workers]
        written = self.hosts.with_suffix(".new")
        written.write_text(json.dumps({NAME: hosts}))
        written.replace(self.hosts)

    async def all_ready(self) -> None:
        for service in (*self.workers, self.router):
            await ready(service.address)
        await self.attached(len(self.workers))

    async def attached(self, num_workers: int) -> None:
        """Wait until the router is attached to so many, by its log."""
        await until(lambda: len(self._attached()) == num_workers)

    def _attached(self) -> set[str]:
        attached = set[str]()
        for line in self.router.log.read_text().splitlines():
            match re.findall(r"worker (\S+:\d+) (attached|lost)", line):
                case [(address, "attached")]:
                    attached.add(address)
                case [(address, "lost")]:
                    attached.discard(address)
        return attached

    async def restart(self, worker: Service) -> None:
        await worker.start(worker.address)
        await self.all_ready()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client(router=self.router.address, store=self.store.address) as client:
            yield client

    async def busiest(self) -> Service:
        """The worker that runs the most, once any runs something."""
        async with asyncio.timeout(30):
            while True:
                statuses = await asyncio.gather(*map(self.status, self.workers))
                most = max(range(len(statuses)), key=lambda number: statuses[number].running)
                if statuses[most].running:
                    return self.workers[most]
                await asyncio.sleep(0.02)

    async def status(self, worker: Service) -> WorkerStatus:
        """An empty one if the worker does not answer."""
        try:
            return (await worker_status(worker.address, timeout_s=5)).status
        except LorryError:
            return WorkerStatus()

    async def idle(self) -> None:
        """Return once no worker runs or has anything waiting."""
        async with asyncio.timeout(30):
            await asyncio.sleep(1.2)  # what a front knows may be as old as this
            while True:
                statuses = [await self.status(worker) for worker in self.workers]
                if not any(status.running or status.waiting for status in statuses):
                    return
                await asyncio.sleep(0.05)


def engine_of(worker: Service) -> psutil.Process:
    [engine] = psutil.Process(worker.pid).children()
    return engine


def suspend(worker: Service) -> None:
    """Both processes of the worker hang."""
    for process in (psutil.Process(worker.pid), engine_of(worker)):
        process.send_signal(signal.SIGSTOP)


def resume(worker: Service) -> None:
    for process in (engine_of(worker), psutil.Process(worker.pid)):
        process.send_signal(signal.SIGCONT)
