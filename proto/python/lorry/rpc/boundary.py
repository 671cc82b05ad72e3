"""The interceptor that stands before every method: who may call, and what failures look like.

A message is parsed behind it too: one that cannot be is the caller's error like any other. Probes
of the server's health pass it as all calls do, but carry no credentials.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from lorry.rpc.call_counts import OK, Call, CallCounts, Outcome
from lorry.rpc.errors import InvalidRequest, LorryError
from lorry.rpc.identity import Authenticator
from lorry.rpc.status import to_status

HEALTH_PREFIX = "/grpc.health.v1.Health/"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # that gRPC's own retries obey; they ignore RetryInfo
Context = grpc.aio.ServicerContext[Any, Any]
Parser = Callable[[Any], Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
else:
    Handler = grpc.RpcMethodHandler  # generic in its stubs only

log = logging.getLogger(__name__)


class Boundary(grpc.aio.ServerInterceptor):
    """Authenticates each call, then ends it with the status of what its method raises."""

    def __init__(self, authenticator: Authenticator, calls: CallCounts) -> None:
        self._authenticator = authenticator
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        return None if handler is None else self._wrapped(handler, method)

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        behavior = getattr(handler, kind)
        wrap = self._streaming if handler.response_streaming else self._unary
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        parse = _parser(handler.request_deserializer or _as_it_is)
        # A stream's messages are parsed as its method reads them, a single one by `call`.
        streamed = handler.request_streaming
        wrapped: Handler = make(
            wrap(behavior, method, _as_it_is if streamed else parse),
            request_deserializer=parse if streamed else None,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _unary(
        self, behavior: Callable[..., Awaitable[Any]], method: str, parse: Parser
    ) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> Any:
            counted = self._begin(method, context)
            try:
                self._admit(method, context)
                response = await behavior(parse(request), context)
                counted.outcome = OK
                return response
            except Exception as error:
                await _end(context, method, error, counted)

        return call

    def _streaming(
        self, behavior: Callable[..., AsyncIterator[Any]], method: str, parse: Parser
    ) -> Callable[..., Any]:
        assert inspect.isasyncgenfunction(behavior), f"{method} must be an async generator"

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            counted = self._begin(method, context)
            try:
                self._admit(method, context)
                async for response in behavior(parse(request), context):
                    yield response
                counted.outcome = OK
            except Exception as error:
                await _end(context, method, error, counted)

        return call

    def _admit(self, method: str, context: Context) -> None:
        if not method.startswith(HEALTH_PREFIX):
            self._authenticator.admit(method, context)

    def _begin(self, method: str, context: Any) -> Call:
        counted = Call(self._calls, method)
        context.add_done_callback(counted.end)
        return counted


def _parser(deserialize: Parser) -> Parser:
    def parse(data: Any) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            raise InvalidRequest(f"the request cannot be parsed: {error}") from error

    return parse


def _as_it_is(request: Any) -> Any:
    return request


async def _end(context: Context, method: str, error: Exception, counted: Call) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        counted.outcome = Outcome(grpc.StatusCode.UNKNOWN.name, "")  # the method's own words
        raise error
    counted.outcome = Outcome.of(error)
    if not isinstance(error, LorryError):
        log.error("unexpected error in %s", method, exc_info=error)
    status = rpc_status.to_status(to_status(error))
    metadata = (*(status.trailing_metadata or ()), *_pushback(error))
    try:
        await context.abort(status.code, status.details or "", metadata)
    except grpc.aio.InternalError as gone:
        # The client left while the status was on its way. gRPC would log this as a defect, and
        # knows how a call ends whose client has left.
        raise asyncio.CancelledError from gone


def _pushback(error: Exception) -> Sequence[tuple[str, str]]:
    """Tells a client's gRPC not to try again too soon."""
    if not isinstance(error, LorryError) or error.retry_after_s is None:
        return ()
    return [(PUSHBACK_KEY, str(round(error.retry_after_s * 1000)))]
