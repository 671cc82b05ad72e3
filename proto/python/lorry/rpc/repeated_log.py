"""Logging of what fails again and again until it works."""

import logging
import time
from collections.abc import Hashable

REPEAT_S = 60.0


class RepeatedLog:
    """A failure of a new kind is logged as asked; the same one then at DEBUG, but once a minute."""

    def __init__(self, log: logging.Logger, *, repeat_s: float = REPEAT_S) -> None:
        self._log = log
        self._repeat_s = repeat_s
        self._kind: Hashable = None
        self._logged_s = -repeat_s

    def failed(
        self,
        kind: Hashable,
        level: int,
        message: str,
        *values: object,
        traceback_of: Exception | None = None,
    ) -> None:
        now_s = time.monotonic()
        if kind == self._kind and now_s < self._logged_s + self._repeat_s:
            level = logging.DEBUG
        else:
            self._kind, self._logged_s = kind, now_s
        self._log.log(level, message, *values, exc_info=traceback_of)

    def worked(self) -> None:
        """The next failure is new."""
        self._kind = None
