"""The routers that a client may ask: all serve the same, and it stays with one until that fails."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from lorry.client.retry import SERVER_WENT, RetryPolicy, retrying, typed
from lorry.rpc.channel import Credentials, open_channel
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub

T = TypeVar("T")
Call = Callable[[Any, float], Awaitable[T]]  # of a router's stub, within so many seconds


def router_addresses(text: str) -> list[str]:
    """Those of ``HOST:PORT,HOST:PORT``; raises ValueError naming what is not a list of them."""
    addresses = [address.strip() for address in text.split(",")]
    if not all(addresses) or len(set(addresses)) < len(addresses):
        raise ValueError(f"router must be HOST:PORT, or different ones and commas, got {text!r}")
    return addresses


class Routers:
    """Owns the channels to them, in the order in which they are asked."""

    def __init__(self, addresses: str, credentials: Credentials) -> None:
        """Raises ValueError for addresses, or credentials, that cannot be read."""
        self._channels = [
            open_channel(address, credentials, spread=True)
            for address in router_addresses(addresses)
        ]
        self._stubs = [InferenceServiceStub(channel) for channel in self._channels]
        self._current = 0

    async def ask(self, call: Call[T], *, policy: RetryPolicy, timeout_s: float) -> T:
        """Each attempt asks every router once, from the one that answered last on; between
        attempts there is a pause. Raises the last error, typed."""
        return await retrying(
            lambda _, remaining_s: self._ask_each(call, time.monotonic() + remaining_s),
            policy=policy,
            timeout_s=timeout_s,
        )

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _ask_each(self, call: Call[T], deadline_s: float) -> T:
        """Raises grpc.RpcError: the first that another router would say, too, or the last."""
        first, count = self._current, len(self._stubs)
        for place in range(first, first + count - 1):
            try:
                return await self._ask(place % count, call, deadline_s)
            except grpc.RpcError as error:
                if typed(error).code not in SERVER_WENT:
                    raise
        return await self._ask((first + count - 1) % count, call, deadline_s)

    async def _ask(self, place: int, call: Call[T], deadline_s: float) -> T:
        answer = await call(self._stubs[place], deadline_s - time.monotonic())
        self._current = place
        return answer
