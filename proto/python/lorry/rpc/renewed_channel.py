"""A channel whose credentials may change: new calls use new ones, those under way keep theirs."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

Metadata = tuple[tuple[str, str], ...]
C = TypeVar("C")


class _Life:
    """One channel of gRPC's, which closes once it is retired and its last call has ended."""

    def __init__(self, channel: grpc.aio.Channel, close: Callable[["_Life"], None]) -> None:
        self.channel = channel
        self._close = close
        self._num_calls = 0
        self._retired = False

    def begin(self, call: Any) -> None:
        self._num_calls += 1
        call.add_done_callback(self._end)

    def retire(self) -> None:
        """There will be no new calls."""
        self._retired = True
        self._close_if_unused()

    def _end(self, _: Any) -> None:
        self._num_calls -= 1
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and not self._num_calls:
            self._close(self)


class RenewedChannel(grpc.aio.Channel, Generic[C]):
    """`source` gives the credentials, the same object until they change; `connect` takes them.

    Every call carries the `metadata` of its moment beside its own.
    """

    def __init__(
        self,
        source: Callable[[], C],
        connect: Callable[[C], grpc.aio.Channel],
        metadata: Callable[[], Metadata],
    ) -> None:
        self._source = source
        self._connect = connect
        self._metadata = metadata
        self._credentials = source()
        self._closing = set[asyncio.Task[None]]()
        self._lives = set[_Life]()
        self._current = self._begin_life()

    @property
    def num_lives(self) -> int:
        """Channels of gRPC's: the one for new calls, and those of calls that began before."""
        return len(self._lives)

    async def __aenter__(self) -> "RenewedChannel[C]":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        lives, self._lives = self._lives, set()
        await asyncio.gather(*(life.channel.close(grace) for life in lives), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return functools.partial(self._call, "unary_unary", method, options)

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return functools.partial(self._call, "unary_stream", method, options)

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return functools.partial(self._call, "stream_unary", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return functools.partial(self._call, "stream_stream", method, options)

    def _call(
        self,
        kind: str,
        method: tuple[Any, ...],
        options: dict[str, Any],
        *request: Any,
        metadata: Any = None,
        **arguments: Any,
    ) -> Any:
        channel = self._channel
        multicallable = getattr(channel, kind)(*method, **options)
        call = multicallable(*request, metadata=(*(metadata or ()), *self._metadata()), **arguments)
        self._current.begin(call)
        return call

    @property
    def _channel(self) -> grpc.aio.Channel:
        """Of the credentials that there are now."""
        credentials = self._source()
        if credentials is not self._credentials:
            self._credentials, old = credentials, self._current
            self._current = self._begin_life()
            old.retire()
        return self._current.channel

    def _begin_life(self) -> _Life:
        life = _Life(self._connect(self._credentials), self._end_life)
        self._lives.add(life)
        return life

    def _end_life(self, life: _Life) -> None:
        if life not in self._lives:  # `close` ends it
            return
        self._lives.remove(life)
        closing = asyncio.get_running_loop().create_task(life.channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
