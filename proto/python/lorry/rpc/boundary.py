"""The interceptor that stands before every method: who may call, and what failures look like.

A message is read and parsed behind it too: nothing of a stranger's call is waited for, what comes
too late or cannot be parsed is the caller's error like any other. Probes of the server's health
pass it as all calls do, but carry no credentials.
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
from lorry.rpc.errors import DeadlineExpired, InvalidRequest, LorryError
from lorry.rpc.identity import Authenticator
from lorry.rpc.status import to_status

HEALTH_PREFIX = "/grpc.health.v1.Health/"
REQUEST_S = 30.0  # that a whole request may take to come
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # that gRPC's own retries obey; they ignore RetryInfo
Context = grpc.aio.ServicerContext[Any, Any]
Parser = Callable[[Any], Any]
Requests = AsyncIterator[Any]
Receiver = Callable[[Requests, Context], Awaitable[Any]]
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
        """A handler of a stream of requests, also where there is one: gRPC would read that before
        it calls anybody, for as long as the caller likes."""
        answers = "stream" if handler.response_streaming else "unary"
        requests = "stream" if handler.request_streaming else "unary"
        behavior = getattr(handler, f"{requests}_{answers}")
        wrap = self._streaming if handler.response_streaming else self._unary
        make = getattr(grpc, f"stream_{answers}_rpc_method_handler")
        wrapped: Handler = make(
            wrap(behavior, method, _as_they_are if handler.request_streaming else _the_only_one),
            request_deserializer=_parser(handler.request_deserializer or _as_it_is),
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _unary(
        self, behavior: Callable[..., Awaitable[Any]], method: str, receive: Receiver
    ) -> Callable[..., Any]:
        async def call(requests: Requests, context: Context) -> Any:
            counted = self._begin(method, context)
            try:
                self._admit(method, context)
                response = await behavior(await receive(requests, context), context)
                counted.outcome = OK
                return response
            except Exception as error:
                await _end(context, method, error, counted)

        return call

    def _streaming(
        self, behavior: Callable[..., AsyncIterator[Any]], method: str, receive: Receiver
    ) -> Callable[..., Any]:
        assert inspect.isasyncgenfunction(behavior), f"{method} must be an async generator"

        async def call(requests: Requests, context: Context) -> AsyncIterator[Any]:
            counted = self._begin(method, context)
            try:
                self._admit(method, context)
                async for response in behavior(await receive(requests, context), context):
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


def _as_it_is(data: bytes) -> bytes:
    return data


async def _as_they_are(requests: Requests, context: Context) -> Requests:
    """Of a stream: its method reads them."""
    return requests


async def _the_only_one(requests: Requests, context: Context) -> Any:
    try:
        async with asyncio.timeout(REQUEST_S):
            request = await context.read()  # `requests` would take a task more, to be closed
    except TimeoutError:
        raise DeadlineExpired(f"the request did not come within {REQUEST_S:g} s") from None
    if request is grpc.aio.EOF:
        raise InvalidRequest("the call ended without a request")
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
