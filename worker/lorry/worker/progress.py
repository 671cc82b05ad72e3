"""What start-up logs: what was done in how many seconds, and how far it is."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

PROGRESS_S = 2.0

Item = TypeVar("Item", covariant=True)


class Items(Sized, Iterable[Item], Protocol[Item]): ...


@contextlib.contextmanager
def logged(log: logging.Logger, done: str) -> Iterator[None]:
    """Log what the block has done, and its seconds."""
    started_s = time.monotonic()
    yield
    log.info("%s in %.1f s", done, time.monotonic() - started_s)


def counted(log: logging.Logger, items: Items[Item], done: str) -> Iterator[Item]:
    """The items; logs every few seconds how many are done, and at the end."""
    started_s = reported_s = time.monotonic()
    for number, item in enumerate(items):
        now_s = time.monotonic()
        if now_s - reported_s >= PROGRESS_S:
            reported_s = now_s
            log.info("%s: %d of %d, %.1f s", done, number, len(items), now_s - started_s)
        yield item
    log.info("%s: %d in %.1f s", done, len(items), time.monotonic() - started_s)
