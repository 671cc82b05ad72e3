"""What the services' processes hold, sample by sample."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic

import psutil

from benchmarks.soak.services import Services

SAMPLE_S = 1.0
WARM_UP_S = 20.0  # of a process's life under load
MIB = 1 << 20


@dataclass
class Life:
    """One process from its start to its end or that of the soak."""

    name: str
    born_s: float
    samples: list[tuple[float, int, int]] = field(default_factory=list)  # time, RSS, files

    @property
    def warm(self) -> list[tuple[float, int, int]]:
        return [sample for sample in self.samples if sample[0] - self.born_s >= WARM_UP_S]

    @property
    def warm_mib(self) -> float:
        """The largest of the first samples after warm-up."""
        return max(rss for _, rss, _ in self.warm[:5]) / MIB

    @property
    def last_mib(self) -> float:
        return self.samples[-1][1] / MIB

    @property
    def peak_mib(self) -> float:
        return max(rss for _, rss, _ in self.samples) / MIB


@dataclass
class Memory:
    services: Services
    stopping: asyncio.Event
    lives: dict[int, Life] = field(default_factory=dict)  # by process id

    async def watch(self) -> None:
        while not self.stopping.is_set():
            self.sample()
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        for name, process in self._processes():
            with contextlib.suppress(psutil.Error):
                life = self.lives.setdefault(process.pid, Life(name, monotonic()))
                sample = (monotonic(), process.memory_info().rss, process.num_fds())
                life.samples.append(sample)

    def running(self) -> list[Life]:
        """Those that are still there, in the order of their start."""
        return [self.lives[p.pid] for _, p in self._processes() if p.pid in self.lives]

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        for service in self.services.all:
            with contextlib.suppress(psutil.Error):
                main = psutil.Process(service.pid)
                name = service.log.stem
                yield name, main
                for child in main.children(recursive=True):
                    yield f"{name}'s child", child
