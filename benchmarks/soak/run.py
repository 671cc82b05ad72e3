"""The soak from its start to its verdict."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.soak.catalogue import Catalogue
from benchmarks.soak.census import Census
from benchmarks.soak.faults import Faults
from benchmarks.soak.memory import Life, Memory
from benchmarks.soak.services import Services
from benchmarks.soak.traffic import Tally, Traffic
from tests.support.command import REPO

NUM_CLIENTS = 12
STOP_S = 120.0  # that clients and faults may take to end what they have begun


@dataclass(frozen=True, kw_only=True)
class Report:
    seed: int
    seconds: float
    tally: Tally
    faults: dict[str, int]
    lives: list[Life]
    violations: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "requests": self.tally.sent,
            "requests_of_killed_clients": self.tally.killed,
            "tokens": self.tally.tokens,
            "ends": {f"{kind}: {end}": n for (kind, end), n in sorted(self.tally.ends.items())},
            "faults": dict(sorted(self.faults.items())),
            "memory_mib": {
                life.name: [round(life.warm_mib), round(life.last_mib), round(life.peak_mib)]
                for life in self.lives
                if life.warm
            },
            "violations": self.violations,
        }

    def table(self) -> Iterator[str]:
        yield f"seed {self.seed}, {self.seconds:.0f} s, {self.tally.sent} requests"
        yield ""
        for (kind, end), count in sorted(self.tally.ends.items()):
            yield f"{count:8} {kind:16} {end}"
        yield ""
        for fault, count in sorted(self.faults.items()):
            yield f"{count:8} {fault}"
        yield ""
        for life in self.lives:
            if life.warm:
                numbers = f"{life.warm_mib:5.0f} {life.last_mib:5.0f} {life.peak_mib:5.0f}"
                yield f"{numbers} MiB warm, last, peak: {life.name}"
        yield ""
        yield from self.violations or ["nothing is left, nothing was wrong"]


async def soak(directory: Path, *, seconds: float, seed: int) -> Report:
    """Run it; `directory` is for logs, adapters and page images."""
    services = Services(directory)
    catalogue = Catalogue.create(directory / "contents", REPO / "demo" / "adapters")
    tally, stopping = Tally(), asyncio.Event()
    memory = Memory(services, stopping)
    interval_s = (3.0, 6.0) if seconds < 300 else (5.0, 60.0)
    faults = Faults(services, catalogue, stopping, interval_s)
    started_s = time.monotonic()
    try:
        await services.start()
        async with services.client() as client:
            await catalogue.ask_everything(client, Random(f"{seed} contents"))
        tally.sent = tally.ends["first", "OK"] = len(catalogue.answers)
        await _disturb(Traffic(services, catalogue, tally, stopping), faults, memory, seconds, seed)
        violations = await Census(services, catalogue, tally, memory).violations()
        lives = memory.running()
    finally:
        statuses = await services.stop()
    if any(statuses):
        violations.append(f"exit statuses after SIGTERM: {statuses}")
    left = [path.name for path in services.shm.iterdir() if path.suffix != ".lock"]
    if left:
        violations.append(f"shared memory left: {left}")
    return Report(
        seed=seed,
        seconds=time.monotonic() - started_s,
        tally=tally,
        faults=dict(faults.counts),
        lives=lives,
        violations=[*tally.violations, *faults.violations, *violations],
    )


async def _disturb(
    traffic: Traffic, faults: Faults, memory: Memory, seconds: float, seed: int
) -> None:
    """Everything at once, until the time is over and all have ended what they had begun."""
    async with asyncio.timeout(seconds + STOP_S), asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            group.create_task(traffic.run(Random(f"{seed} client {number}")))
        group.create_task(traffic.run_killed(Random(f"{seed} killed")))
        group.create_task(faults.change_adapters(Random(f"{seed} changes")))
        group.create_task(faults.kill_services(Random(f"{seed} kills")))
        group.create_task(memory.watch())
        await asyncio.sleep(seconds)
        traffic.stopping.set()
