"""The links to the workers that discovery knows, begun and ended as workers come and go."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from lorry.router.discovery import Discovery
from lorry.router.worker_link import WorkerLink

log = logging.getLogger(__name__)


class Roster:
    """A worker that is not listed any more gets nothing new, but may finish what it runs."""

    def __init__(
        self, discovery: Discovery, make_link: Callable[[str], WorkerLink], *, interval_s: float
    ) -> None:
        self._discovery = discovery
        self._make_link = make_link
        self._interval_s = interval_s
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def links(self) -> Mapping[str, WorkerLink]:
        """By the workers' addresses; changes as they do."""
        return self._links

    async def run(self) -> None:
        """Hold the links until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._update(await self._discovery.addresses(), tasks)
                await asyncio.sleep(self._interval_s)

    def _update(self, listed: frozenset[str], tasks: asyncio.TaskGroup) -> None:
        for address in sorted(listed - self._links.keys()):
            self._begin(address, tasks)
        for address, link in self._links.items():
            link.set_listed(address in listed)
            if address not in listed and link.idle:
                self._tasks[address].cancel()

    def _begin(self, address: str, tasks: asyncio.TaskGroup) -> None:
        link = self._links[address] = self._make_link(address)
        task = self._tasks[address] = tasks.create_task(link.run())
        task.add_done_callback(lambda _: self._ended(address))

    def _ended(self, address: str) -> None:
        log.debug("worker %s is not looked for any more", address)
        del self._links[address], self._tasks[address]
