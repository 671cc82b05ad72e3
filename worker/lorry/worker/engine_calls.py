"""Commands that the engine answers."""

import asyncio
import itertools
from collections.abc import Callable

from lorry.rpc.errors import DeadlineExpired, LorryError
from lorry.worker.failures import to_error
from lorry.worker.messages import AdminResult, Command, Failure

TIMEOUT_S = 120.0


class EngineCalls:
    """Sends numbered commands and waits for their results."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Failure | None]] = {}

    async def call(self, build: Callable[[int], Command]) -> None:
        """Send what `build` makes of the call's number; raises the failure of its result."""
        number = next(self._numbers)
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(build(number))
            async with asyncio.timeout(TIMEOUT_S):
                failure = await future
        except TimeoutError as error:
            raise DeadlineExpired(f"the engine did not do it within {TIMEOUT_S:.0f} s") from error
        finally:
            del self._pending[number]
        if failure is not None:
            raise to_error(failure)

    def answer(self, result: AdminResult) -> None:
        future = self._pending.get(result.call)
        if future is not None and not future.done():
            future.set_result(result.failure)

    def fail_all(self, error: LorryError) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)
