"""Learning what other stores change in a shared backend, and whether it can be reached."""

import logging
from collections.abc import Callable

from lorry.adapter_store.catalogue import Catalogue
from lorry.rpc.backoff import Backoff
from lorry.rpc.errors import StoreUnavailable
from lorry.rpc.repeated_log import RepeatedLog

log = logging.getLogger(__name__)


class Follower:
    """Keeps a catalogue up to date."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.reachable = True
        self._catalogue = catalogue
        self._backoff = Backoff()
        self._log = RepeatedLog(log)
        self._listeners: list[Callable[[bool], None]] = []

    def when_reachable_changes(self, listener: Callable[[bool], None]) -> None:
        """Call `listener` now and at each change with whether the backend can be reached."""
        self._listeners.append(listener)
        listener(self.reachable)

    async def run(self) -> None:
        """Follow for as long as the store runs."""
        while True:
            try:
                await self._catalogue.catch_up(wait=True)
            except StoreUnavailable as error:
                self._log.failed(str(error), logging.WARNING, "%s; what is here goes on", error)
                self._set_reachable(False)
                await self._backoff.wait()
            except Exception as error:
                kind, message = repr(error), "following other stores failed; it is tried again"
                self._log.failed(kind, logging.ERROR, message, traceback_of=error)
                await self._backoff.wait()
            else:
                self._set_reachable(True)

    def _set_reachable(self, reachable: bool) -> None:
        if reachable:
            self._backoff.reset()
            self._log.worked()
        if reachable != self.reachable:
            self.reachable = reachable
            log.info("the backend is %s", "there again" if reachable else "away")
            for listener in self._listeners:
                listener(reachable)
