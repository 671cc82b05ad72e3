"""What is left when nobody asks for anything any more, and whether the books are right."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from benchmarks.soak.catalogue import CHANGING, QUESTIONS, STABLE, Catalogue
from benchmarks.soak.memory import Memory
from benchmarks.soak.services import Services
from benchmarks.soak.traffic import Tally
from lorry.client import Client
from lorry.client.probe import worker_status
from lorry.rpc.errors import AdapterNotFound
from lorry.v1.worker_admin_service_pb2 import EvictAdapterRequest
from lorry.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.processes import Service
from tests.support.scrape import Scrape, metrics_url, scrape

SETTLE_S = 30.0
GROWTH_MIB = 24.0  # that a process may have at the end above what it had when it was warm
GROWTH_SHARE = 0.1  # the same, as a share
SPARE_FILES = 12  # that a process may have open beyond those of when it was warm
GENERATING = ("/lorry.v1.InferenceService/Generate", "/lorry.v1.InferenceService/StreamGenerate")
DEFECTS = re.compile(r"Traceback|Task exception|was never|CRITICAL|Segmentation|AssertionError")


@dataclass
class Census:
    services: Services
    catalogue: Catalogue
    tally: Tally
    memory: Memory

    async def violations(self) -> list[str]:
        """Of everything that must hold once all clients have gone."""
        async with self.services.client() as client:
            found = [each async for each in self._wrong_adapters(client)]
        for check in (
            self._router_is_idle,
            *(self._worker_is_idle(worker) for worker in self.services.workers),
            self._leases_end,
        ):
            if problem := await settled(check):
                found.append(problem)
        found += await self._counters()
        found += self._growth()
        found += self._logged_defects()
        return found

    async def _wrong_adapters(self, client: Client) -> AsyncIterator[str]:
        """Each id serves what it was last told to, and the store lists nothing else."""
        listed = {a.name.rpartition("/")[2]: a.version async for a in client.adapters.list()}
        expected = {a: content for a, content in self.catalogue.current.items() if content}
        named = {a: self.catalogue.versions.get(version) for a, version in listed.items()}
        if named != expected:
            yield f"the store lists {named}, not {expected}"
        for adapter_id in (*STABLE, *CHANGING):
            content = self.catalogue.current[adapter_id]
            self.tally.sent += 1
            try:
                answer = await client.generate(QUESTIONS[0].request(adapter_id), timeout_s=60)
            except AdapterNotFound as error:
                self.tally.ends["last", error.reason] += 1
                if content is not None:
                    yield f"{adapter_id} is not found, and should be {content}"
                continue
            self.tally.ends["last", "OK"] += 1
            if content is None:
                yield f"{adapter_id} is served, and was deleted"
            elif list(answer.token_ids) != self.catalogue.answers[content, QUESTIONS[0]]:
                yield f"{adapter_id} has not the tokens of {content}"

    async def _router_is_idle(self) -> str:
        found = await scraped(self.services.router)
        in_progress = found.value("lorry_router_requests_in_progress")
        at_workers = found.value("lorry_router_worker_requests")
        calls = sum(
            found.value("lorry_router_calls_in_progress", method=method) for method in GENERATING
        )
        if in_progress or at_workers or calls:
            return f"router: {in_progress} requests, {at_workers} at workers, {calls} calls left"
        return ""

    def _worker_is_idle(self, worker: Service) -> Callable[[], Awaitable[str]]:
        async def check() -> str:
            status = (await worker_status(worker.address, timeout_s=10)).status
            held = status.pages_free + status.pages_adapter + status.pages_cached
            if status.running or status.waiting or status.pages_kv:
                return f"{worker.log.stem}: not idle: {status}"
            if held != status.pages_total:
                return f"{worker.log.stem}: of {status.pages_total} pages {held} are known"
            return ""

        return check

    async def _leases_end(self) -> str:
        """After the workers have been told to give up all adapters."""
        for worker in self.services.workers:
            await evict_all(worker)
        found = await scraped(self.services.store)
        leases, images = found.value("lorry_store_leases"), found.value("lorry_store_ram_images")
        files = [path.name for path in self.services.shm.iterdir() if path.suffix != ".lock"]
        if leases or len(files) > images:
            return f"store: {leases} leases, {images} images in {len(files)} files: {files}"
        return ""

    async def _counters(self) -> list[str]:
        found = list[str]()
        for service, prefix in [
            (self.services.router, "lorry_router"),
            *((worker, "lorry_worker") for worker in self.services.workers),
        ]:
            metrics = await scraped(service)
            received = metrics.value(f"{prefix}_requests_received_total")
            ended = metrics.value(f"{prefix}_requests_total")
            if received != ended:
                found.append(f"{service.log.stem}: received {received} requests, ended {ended}")
        return found + self._calls(await scraped(self.services.router))

    def _calls(self, metrics: Scrape) -> list[str]:
        """The router has seen each call that clients have sent; some left before it did."""

        def calls(**labels: str) -> float:
            return sum(
                metrics.value("lorry_router_calls_total", method=method, **labels)
                for method in GENERATING
            )

        tally, found = self.tally, list[str]()
        left = tally.total("left") + tally.total("DEADLINE_EXPIRED")
        if not tally.sent - left <= calls() <= tally.sent + tally.killed:
            found.append(f"router: {calls()} calls, clients sent {tally.sent} (and {tally.killed})")
        if calls(code="OK") < tally.total("OK"):
            found.append(f"router: {calls(code='OK')} calls ended well, of {tally.total('OK')}")
        for code in ("INTERNAL", "UNKNOWN"):
            if calls(code=code):
                found.append(f"router: {calls(code=code)} calls ended {code}")
        return found

    def _growth(self) -> list[str]:
        self.memory.sample()
        found = list[str]()
        for life in self.memory.running():
            if not life.warm:
                continue
            bound = max(GROWTH_MIB, GROWTH_SHARE * life.warm_mib)
            if life.last_mib - life.warm_mib > bound:
                found.append(
                    f"{life.name}: {life.warm_mib:.0f} MiB when warm, {life.last_mib:.0f} now"
                )
            files, warm = life.samples[-1][2], max(files for _, _, files in life.warm[:5])
            if files > warm + SPARE_FILES:
                found.append(f"{life.name}: {warm} open files when warm, {files} now")
        return found

    def _logged_defects(self) -> list[str]:
        found = list[str]()
        for service in self.services.all:
            for line in service.log.read_text().splitlines():
                if DEFECTS.search(line):
                    found.append(f"{service.log.name}: {line}")
        return found


async def settled(check: Callable[[], Awaitable[str]]) -> str:
    """What the check still finds when it has had time."""
    problem = "never checked"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            while True:
                problem = await check()
                if not problem:
                    break
                await asyncio.sleep(0.2)
    return problem


async def scraped(service: Service) -> Scrape:
    return await scrape(metrics_url(service.log.read_text()))


async def evict_all(worker: Service) -> None:
    residency = (await worker_status(worker.address, timeout_s=10)).residency
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub: Any = WorkerAdminServiceStub(channel)
        for version in {*residency.gpu_added, *residency.host_added}:
            await stub.EvictAdapter(EvictAdapterRequest(version=version), timeout=30)
