"""Values that are read from files, and read again while the process runs when these change."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

LOOK_S = 1.0
T = TypeVar("T")
Signature = tuple[tuple[int, int, int] | None, ...]

log = logging.getLogger(__name__)


class Reloading(Generic[T]):
    """`get` from any thread; where files are being replaced or damaged, the last value stays.

    The first reading raises what `read` raises; later failures are logged, once for each change.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], *, look_s: float = LOOK_S
    ) -> None:
        """Looks at the files at most every `look_s` seconds."""
        self._paths = paths
        self._read = read
        self._look_s = look_s
        self._lock = threading.Lock()
        self._signature = self._look()
        self._value = read()
        self._looked_s = time.monotonic()

    def get(self) -> T:
        """The same object until the files change."""
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._looked_s + self._look_s:
                self._looked_s = now_s
                self._update()
            return self._value

    def _update(self) -> None:
        signature = self._look()  # before the reading: what changes during it is seen next time
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            log.error("what was read before stays in force: %s", error)
        else:
            log.info("read %s again", ", ".join(map(str, self._paths)))

    def _look(self) -> Signature:
        return tuple(map(_signature, self._paths))


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)
