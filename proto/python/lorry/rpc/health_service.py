"""grpc.health.v1: whether a server lives, and whether to send requests to its services.

Each watch waits by itself: one whose client does not read holds up neither another nor the server.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.rpc.errors import QueueFull

MAX_WATCHES = 1024  # strangers may watch, since probes carry no credentials
Context = grpc.aio.ServicerContext[Any, Any]
Status = Any  # a ServingStatus; the package has no types
SERVING: Status = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Status = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # has no types
    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}
        self._changed = asyncio.Event()  # a new one after each change
        self._num_watches = 0
        self._draining = False
        self._ended = False

    def set(self, services: tuple[str, ...], status: Status) -> None:
        """Does nothing once the server drains."""
        if not self._draining:
            self._statuses |= dict.fromkeys(services, status)
            self._wake()

    def drain(self) -> None:
        """NOT_SERVING for every service from now on."""
        self.set(tuple(self._statuses), NOT_SERVING)
        self._draining = True

    def end(self) -> None:
        """End all watches, which would else hold up the server's stop."""
        self._ended = True
        self._wake()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)  # the words of the health protocol
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        if self._num_watches >= MAX_WATCHES:
            raise QueueFull(f"{MAX_WATCHES} watches are open", retry_after_s=1.0)
        self._num_watches += 1
        context.add_done_callback(self._watch_ended)
        told = None
        while not self._ended:
            changed, status = self._changed, self._statuses.get(request.service, SERVICE_UNKNOWN)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            else:
                await changed.wait()

    def _watch_ended(self, _: object) -> None:
        self._num_watches -= 1

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
