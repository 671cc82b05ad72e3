"""All services of lorry.v1 behind the real boundary, with methods that do nothing."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from lorry.rpc.channel import ANONYMOUS, Credentials, open_channel
from lorry.rpc.identity import Authenticator
from lorry.rpc.server import Server, serving
from lorry.rpc.tls import ServerTls
from lorry.v1 import (
    adapter_data_service_pb2,
    adapter_service_pb2,
    catalogue_service_pb2,
    inference_service_pb2,
    store_admin_service_pb2,
    worker_admin_service_pb2,
    worker_service_pb2,
)

FILES = [
    adapter_data_service_pb2,
    adapter_service_pb2,
    catalogue_service_pb2,
    inference_service_pb2,
    store_admin_service_pb2,
    worker_admin_service_pb2,
    worker_service_pb2,
]
Hook = Callable[[], object]
LOST_ANSWER = "Internal error from Core"


class Method(NamedTuple):
    path: str  # /package.Service/Method
    kind: str  # such as unary_stream
    request: type[Message]
    response: type[Message]

    @classmethod
    def of(cls, method: MethodDescriptor) -> "Method":
        request = "stream" if method.client_streaming else "unary"
        response = "stream" if method.server_streaming else "unary"
        return cls(
            f"/{method.containing_service.full_name}/{method.name}",
            f"{request}_{response}",
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
        )

    def handler(self, hook: Hook) -> Any:
        """A method that calls `hook`, reads its request and answers with an empty message."""

        async def read(request: Any) -> None:
            if self.kind.startswith("stream"):
                async for _ in request:
                    pass

        async def unary(request: Any, context: Any) -> Message:
            hook()
            await read(request)
            return self.response()

        async def stream(request: Any, context: Any) -> AsyncIterator[Message]:
            hook()
            await read(request)
            yield self.response()

        make = getattr(grpc, f"{self.kind}_rpc_method_handler")
        return make(
            stream if self.kind.endswith("stream") else unary,
            request_deserializer=self.request.FromString,
            response_serializer=self.response.SerializeToString,
        )

    async def call(self, channel: grpc.aio.Channel, token: str | None = None) -> list[Any]:
        """Call it with an empty request and return the answers.

        Where a server answers before a first message is sent, grpc.aio may lose the answer. It is
        asked for once more, by a call that sends nothing and so can lose nothing.
        """
        try:
            return await self._call(channel, token, self.request())
        except grpc.aio.AioRpcError as error:
            if error.details() != LOST_ANSWER:
                raise
        return await self._call(channel, token, None)

    async def _call(
        self, channel: grpc.aio.Channel, token: str | None, request: Message | None
    ) -> list[Any]:
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        multicallable = getattr(channel, self.kind)(
            self.path,
            request_serializer=self.request.SerializeToString,
            response_deserializer=self.response.FromString,
        )
        sent: Any = request
        if self.kind.startswith("stream") and request is not None:
            sent = iter([request])
        call = multicallable(sent, metadata=metadata, timeout=30)
        if self.kind.endswith("stream"):
            return [response async for response in call]
        return [await call]


def all_methods() -> Iterator[Method]:
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from (Method.of(method) for method in service.methods)


METHODS = {method.path: method for method in all_methods()}


def _do_nothing() -> None:
    """A hook."""


@contextlib.asynccontextmanager
async def serving_all(
    authenticator: Authenticator,
    *,
    hook: Hook = _do_nothing,
    tls: ServerTls | None = None,
    credentials: Credentials = ANONYMOUS,
    health_address: str = "",
) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server with every method, and a channel to it."""
    services = sorted({path.split("/")[1] for path in METHODS})

    def register(server: grpc.aio.Server) -> None:
        for service in services:
            handlers = {
                path.split("/")[2]: method.handler(hook)
                for path, method in METHODS.items()
                if path.split("/")[1] == service
            }
            generic = grpc.method_handlers_generic_handler(service, handlers)
            server.add_generic_rpc_handlers((generic,))

    async with (
        serving(
            register,
            services=services,
            address="127.0.0.1:0",
            authenticator=authenticator,
            grace_s=0,
            tls=tls,
            health_address=health_address,
        ) as server,
        open_channel(f"127.0.0.1:{server.port}", credentials) as channel,
    ):
        yield server, channel
