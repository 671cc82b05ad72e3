"""The real services as processes, for tests that kill them."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from lorry.client import Client
from lorry.client.probe import is_ready, worker_status
from lorry.rpc.channel import ANONYMOUS, Credentials
from lorry.rpc.errors import LorryError
from lorry.v1.worker_service_pb2 import WorkerStatus
from tests.support.command import REPO, child_environment

START_TIMEOUT_S = 120.0
HEARTBEAT_S = 1.2
DEMO_MODEL = REPO / "demo" / "model"


class Service:
    """One ``python -m lorry.NAME``, or another module, and its log. With `niceness` it leaves the
    CPUs to the others, as nice(1) says."""

    def __init__(
        self, name: str, log: Path, *options: str, module: str = "", niceness: int = 0
    ) -> None:
        self.name = name
        self.module = module or f"lorry.{name}"
        self.log = log
        self.options = options
        self.niceness = niceness
        self.address = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, address: str = "127.0.0.1:0") -> None:
        """Start it and wait until it listens."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(["nice", "-n", str(self.niceness)] if self.niceness else []),
                sys.executable,
                "-m",
                self.module,
                "--address",
                address,
                *self.options,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_environment(),
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = (await self._process.stdout.readline()).decode()
        assert " listening on " in line, f"{self.name}: {line!r}\n{self.log.read_text()}"
        self.address = line.split()[-1]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self, *, timeout_s: float = 60.0) -> int:
        """Its exit status."""
        assert self._process is not None
        async with asyncio.timeout(timeout_s):
            return await self._process.wait()

    async def stop(self) -> None:
        """End it if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self.kill(signal.SIGTERM)
            try:
                await self.wait(timeout_s=30.0)
            except TimeoutError:
                self.kill()
                await self.wait()


class Stack:
    """Adapter store, worker and router over the demo model."""

    def __init__(self, directory: Path, *worker_options: str) -> None:
        model = ["--model", str(DEMO_MODEL)]
        shm = ["--shm-dir", str(directory / "shm")]
        self.directory = directory
        backend = ["--backend", f"file://{directory / 'adapters'}"]
        self.store = Service("adapter_store", directory / "store.log", *model, *shm, *backend)
        self.worker = Service(
            "worker", directory / "worker.log", *model, *shm, "--threads", "1", *worker_options
        )
        # A worker's next life may take a busy machine longer than a router waits by default.
        wait = ["--worker-wait-s", "60"]
        self.router = Service("router", directory / "router.log", *model, *wait)

    async def start(self) -> None:
        await self.store.start()
        self.worker.options += ("--store", self.store.address)
        await self.worker.start()
        self.router.options += ("--store", self.store.address, "--worker", self.worker.address)
        await self.router.start()

    async def stop(self) -> None:
        for service in (self.router, self.worker, self.store):
            await service.stop()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client(router=self.router.address, store=self.store.address) as client:
            yield client

    async def worker_status(self) -> WorkerStatus:
        return (await worker_status(self.worker.address, timeout_s=10)).status

    async def idle(self) -> WorkerStatus:
        """The worker's status once nothing runs or waits and no KV page is held."""
        async with asyncio.timeout(30.0):
            await asyncio.sleep(HEARTBEAT_S)  # what the front knows may be as old as this
            while True:
                status = await self.worker_status()
                if not (status.running or status.waiting or status.pages_kv):
                    return status
                await asyncio.sleep(0.05)


async def ready(
    address: str, credentials: Credentials = ANONYMOUS, *, timeout_s: float = START_TIMEOUT_S
) -> None:
    """Return once the service at `address` is ready for requests."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(LorryError):
                if await is_ready(address, credentials, timeout_s=5):
                    return
            await asyncio.sleep(0.05)
