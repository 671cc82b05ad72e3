"""When a failed call is tried again: where the server went, a few times, within the deadline."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import grpc

from lorry.rpc.errors import DeadlineExpired, LorryError, RemoteError
from lorry.rpc.status import from_rpc

# A server that stops cancels what runs beyond its grace. Who cancels a call of its own sees
# asyncio.CancelledError instead.
SERVER_WENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often and how long after each other attempts are made."""

    attempts: int = 5  # the first one included
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")

    def delay_s(self, attempt: int, error: LorryError, jitter: float) -> float | None:
        """Seconds to wait after the failure of `attempt` (from 0); None = give up.

        `jitter` in [0, 1) spreads clients that failed together over twice the delay. It never
        shortens what the server asked for.
        """
        if error.code not in SERVER_WENT or attempt + 1 >= self.attempts:
            return None
        backoff_s = min(self.first_delay_s * 2.0**attempt, self.max_delay_s)
        return max(backoff_s / 2, error.retry_after_s or 0.0) + jitter * backoff_s


async def retrying(
    call: Callable[[int, float], Awaitable[T]], *, policy: RetryPolicy, timeout_s: float
) -> T:
    """Await ``call(attempt, remaining_s)`` until it succeeds; raises the last error, typed.

    `timeout_s` bounds all attempts and the waits between them.
    """
    deadline_s = time.monotonic() + timeout_s
    for attempt in count():
        try:
            return await call(attempt, deadline_s - time.monotonic())
        except grpc.RpcError as error:
            failure = typed(error)
            delay_s = policy.delay_s(attempt, failure, random.random())
            if delay_s is None or time.monotonic() + delay_s >= deadline_s:
                raise failure from error
            await asyncio.sleep(delay_s)
    raise AssertionError("count() is endless")


def typed(error: grpc.RpcError) -> LorryError:
    """The error behind a failed call; a deadline is the same error whichever side noticed it."""
    failure = from_rpc(error)
    if isinstance(failure, RemoteError) and failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExpired("no answer within the deadline of the call")
    return failure
