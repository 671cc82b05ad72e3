"""What a service says of itself: its health, and a worker's status."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.client.retry import typed
from lorry.rpc.channel import ANONYMOUS, Credentials, open_channel
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_service_pb2_grpc import WorkerServiceStub

READINESS = "readiness"
ServingStatus = health_pb2.HealthCheckResponse.ServingStatus


async def is_ready(address: str, credentials: Credentials = ANONYMOUS, *, timeout_s: float) -> bool:
    """Whether the service takes requests; raises LorryError if it does not answer."""
    async with open_channel(address, credentials) as channel:
        try:
            response = await _health_stub(channel).Check(
                health_pb2.HealthCheckRequest(service=READINESS), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise typed(error) from error
    return bool(response.status == ServingStatus.Value("SERVING"))


async def readiness(address: str) -> AsyncIterator[bool]:
    """Whether the service takes requests: now, and after each change; ends with the service."""
    async with open_channel(address) as channel:
        stub = _health_stub(channel)
        try:
            async for response in stub.Watch(health_pb2.HealthCheckRequest(service=READINESS)):
                yield bool(response.status == ServingStatus.Value("SERVING"))
        except grpc.RpcError as error:
            raise typed(error) from error


async def worker_status(
    address: str, credentials: Credentials = ANONYMOUS, *, timeout_s: float
) -> pb.GetWorkerStatusResponse:
    """A worker's own account of its pool and what it runs."""
    async with open_channel(address, credentials) as channel:
        try:
            response: pb.GetWorkerStatusResponse = await WorkerServiceStub(channel).GetWorkerStatus(
                pb.GetWorkerStatusRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise typed(error) from error
    return response


def _health_stub(channel: grpc.aio.Channel) -> Any:  # it has no stubs for type checkers
    return health_pb2_grpc.HealthStub(channel)
