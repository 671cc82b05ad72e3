"""Store, worker and router on this machine: started in order, watched, stopped in reverse."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lorry.client.endpoints import Endpoints
from lorry.client.local.process import ServiceProcess, State

LOOK_AGAIN_S = 0.05
STORE_GRACE_S = 2.0  # of a store when all services are killed


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceOptions:
    """How one service is started."""

    port: int = 0  # of 127.0.0.1; 0 = a free one
    arguments: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StackOptions:
    model: Path
    logs: Path  # an existing directory
    store: ServiceOptions = ServiceOptions()
    worker: ServiceOptions = ServiceOptions()
    router: ServiceOptions = ServiceOptions()
    grace_s: float = 10.0  # for each service to drain


class LocalStack:
    """The three services; `local_stack` owns one."""

    def __init__(self, options: StackOptions, on_change: Callable[[ServiceProcess], None]) -> None:
        self.services: list[ServiceProcess] = []  # in the order of their start
        self._options = options
        self._on_change = on_change

    async def start(self, *, timeout_s: float) -> Endpoints:
        """Start all three and wait until they are ready; raises ServiceFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._start_all()
        except TimeoutError:
            late = next(each for each in self.services if each.state is not State.READY)
            raise late.failure() from None

    async def watch(self) -> NoReturn:
        """Raise ServiceFailed once a service ends."""
        while True:
            for service in self.services:
                if service.exit_status is not None:
                    raise service.failure()
            await asyncio.sleep(LOOK_AGAIN_S)

    async def stop(self) -> None:
        """Stop what runs, the router first: what it still serves needs the others."""
        for service in reversed(self.services):
            await service.stop(grace_s=self._options.grace_s)

    def kill(self) -> None:
        """End all now, but leave the store a moment to delete its page images from shared memory,
        which nothing else does."""
        for service in self.services[1:]:
            service.kill()
        for store in self.services[:1]:
            store.terminate()
            asyncio.get_running_loop().call_later(STORE_GRACE_S, store.kill)

    async def _start_all(self) -> Endpoints:
        options = self._options
        store = await self._start("adapter store", "lorry.adapter_store", options.store)
        worker = await self._start("worker", "lorry.worker", options.worker, "--store", store)
        router = await self._start(
            "router", "lorry.router", options.router, "--store", store, "--worker", worker
        )
        for service in self.services:
            await service.ready.wait()
        return Endpoints(router=router, store=store, worker=worker)

    async def _start(self, name: str, module: str, options: ServiceOptions, *arguments: str) -> str:
        command = [sys.executable, "-m", module, "--address", f"127.0.0.1:{options.port}"]
        command += ["--model", str(self._options.model), *arguments, *options.arguments]
        log = self._options.logs / f"{module.removeprefix('lorry.')}.log"
        service = ServiceProcess(name, command, log=log, on_change=self._on_change)
        self.services.append(service)
        return await service.start()


@asynccontextmanager
async def local_stack(
    options: StackOptions, on_change: Callable[[ServiceProcess], None]
) -> AsyncIterator[LocalStack]:
    """A stack that is stopped on every exit; `LocalStack.start` starts it."""
    stack = LocalStack(options, on_change)
    try:
        yield stack
    finally:
        await stack.stop()
