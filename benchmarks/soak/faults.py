"""What is done to the services: adapters change all the time, and processes are killed."""

import asyncio
import signal
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import psutil

from benchmarks.soak.catalogue import CHANGING, Catalogue
from benchmarks.soak.services import Services
from lorry.client import Client
from lorry.rpc.errors import AdapterNotFound, LorryError, RemoteError, StoreUnavailable
from tests.support.processes import Service, ready
from tests.support.waiting import set_within


@dataclass
class Faults:
    services: Services
    catalogue: Catalogue
    stopping: asyncio.Event
    interval_s: tuple[float, float]  # least and most, between a recovery and the next fault
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    async def change_adapters(self, random: Random) -> None:
        async with self.services.client() as client:
            while not await set_within(self.stopping, random.uniform(0.1, 1.0)):
                adapter_id = random.choice(CHANGING)
                try:
                    await self._change(client, random, adapter_id)
                except LorryError as error:
                    self.counts[f"change {error.reason or error.code.name}"] += 1
                    await self._ask_what_it_is(client, adapter_id)

    async def kill_services(self, random: Random) -> None:
        """One of them at a time; each comes back at its address before the next goes."""
        kinds = [self._kill_worker, self._kill_engine, self._kill_store, self._drain_worker]
        turn = 0
        random.shuffle(kinds)
        while not await set_within(self.stopping, random.uniform(*self.interval_s)):
            await kinds[turn % len(kinds)](random)
            turn += 1

    async def _change(self, client: Client, random: Random, adapter_id: str) -> None:
        if random.random() < 0.25:
            await client.adapters.delete(adapter_id, missing_ok=True)
            self.catalogue.note(adapter_id, None)
            self.counts["deleted"] += 1
        else:
            content = random.choice(self.catalogue.contents)
            self.catalogue.may_become(adapter_id, content.name)
            await client.adapters.push(content, adapter_id=adapter_id, replace=True)
            self.catalogue.note(adapter_id, content.name)
            self.counts["pushed"] += 1

    async def _ask_what_it_is(self, client: Client, adapter_id: str) -> None:
        """The answer to a change was lost: it was made or was not."""
        async with asyncio.timeout(60):
            while True:
                try:
                    version = (await client.adapters.show(adapter_id)).version
                    return self.catalogue.note(adapter_id, self.catalogue.versions[version])
                except AdapterNotFound:
                    return self.catalogue.note(adapter_id, None)
                except (StoreUnavailable, RemoteError):
                    await asyncio.sleep(0.2)

    async def _kill_worker(self, random: Random) -> None:
        worker = random.choice(self.services.workers)
        worker.kill()
        await self._back("worker killed", worker, fails=True)

    async def _kill_engine(self, random: Random) -> None:
        worker = random.choice(self.services.workers)
        for engine in psutil.Process(worker.pid).children():
            engine.kill()
        await self._back("engine killed", worker, fails=True)

    async def _kill_store(self, random: Random) -> None:
        self.services.store.kill()
        await self._back("store killed", self.services.store, fails=True)

    async def _drain_worker(self, random: Random) -> None:
        worker = random.choice(self.services.workers)
        worker.kill(signal.SIGTERM)
        await self._back("worker drained", worker, fails=False)

    async def _back(self, what: str, service: Service, *, fails: bool) -> None:
        self.counts[what] += 1
        status = await service.wait()
        if bool(status) is not fails:
            self.violations.append(f"{what}: it exited with {status}")
        await service.start(service.address)
        await ready(service.address)
