"""Carries requests from clients to workers and their outputs back.

receive → resolve → tokenize → queue → (the fleet: submit, draw tokens) → end
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from lorry.router.active import ActiveRequests
from lorry.router.catalogue import AdapterVersion
from lorry.router.config import Config
from lorry.router.context_length import check_answer_size, resolve_max_tokens
from lorry.router.dispatcher import Dispatcher
from lorry.router.fleet import Fleet
from lorry.router.generation import Generation
from lorry.router.output import Output
from lorry.router.request import Request, RequestState
from lorry.router.tenants import Tenants
from lorry.router.text_stream import TextStream
from lorry.router.tokenizer import Tokenizer
from lorry.rpc.errors import Draining, Interrupted, LorryError, SlowReader
from lorry.rpc.names import AdapterName

BASE_MODEL = AdapterVersion(version=b"", rank=0, num_bytes=0)
S = RequestState


class Resolver(Protocol):
    async def resolve(self, name: AdapterName) -> AdapterVersion: ...


class Router:
    def __init__(
        self,
        config: Config,
        dispatcher: Dispatcher,
        active: ActiveRequests,
        fleet: Fleet,
        tokenizer: Tokenizer,
        resolver: Resolver,
        tenants: Tenants,
        *,
        max_context_tokens: int,
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._active = active
        self._fleet = fleet
        self._tokenizer = tokenizer
        self._resolver = resolver
        self._tenants = tenants
        self._max_context_tokens = max_context_tokens
        self._loop = asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def generate(
        self,
        generation: Generation,
        *,
        remaining_s: float | None,
        streaming: bool,
        when_client_left: Callable[[Callable[[], None]], None],
    ) -> AsyncIterator[Output]:
        """Open a generation; leaving the context ends it and frees everything.

        A client that is lost while a message is sent to it may never let the context be left, so
        `when_client_left` takes what must be called then.
        """
        request, output = self._receive(generation, remaining_s, streaming=streaming)
        when_client_left(lambda: self._active.end(request, S.CANCELLED))
        try:
            await self._prepare_in_time(request, streaming=streaming)
            yield output
        except LorryError as error:
            self._active.end(request, S.FAILED, error)
            raise
        finally:
            self._active.end(request, S.CANCELLED)

    async def watch_clients(self) -> None:
        """End the requests of clients that stopped reading, until cancelled."""
        stall_s = self._config.client_stall_s
        while True:
            await asyncio.sleep(stall_s / 4)
            latest_s = self._loop.time() - stall_s
            for request in self._active:
                taken_s = self._active.output(request).taken_s
                if taken_s is not None and taken_s < latest_s:
                    message = f"the client has read nothing for {stall_s:g} s"
                    self._active.fail(request, SlowReader(message))

    async def drain(self) -> None:
        """Take no new requests; return when none runs, or end what still runs after the grace."""
        self._dispatcher.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.grace_s):
                await self._active.none_left()
        for request in self._active:
            self._active.give_up(request, Draining("the router is shutting down"), Interrupted)

    def _receive(
        self, generation: Generation, remaining_s: float | None, *, streaming: bool
    ) -> tuple[Request, Output]:
        now_s, life_s = self._loop.time(), self._config.max_request_s
        request = Request(
            generation,
            seed=random.getrandbits(64) if generation.seed is None else generation.seed,
            arrival_s=now_s,
            slo=generation.slo.over(self._tenants[generation.tenant].slo),
            deadline_s=now_s + (life_s if remaining_s is None else min(remaining_s, life_s)),
        )
        self._active.counts.received += 1
        try:
            self._dispatcher.receive(request)
        except LorryError as error:
            self._active.counts.refuse(error)
            self._active.slo_counts.end(request, S.FAILED)
            raise
        text = TextStream(
            self._tokenizer.table,
            stop_strings=generation.stop_strings,
            stop_token_ids=generation.stop_token_ids,
            min_tokens=generation.min_tokens,
        )
        output = Output(text, streaming=streaming)
        self._active.add(request, output)
        return request, output

    async def _prepare_in_time(self, request: Request, *, streaming: bool) -> None:
        try:
            async with asyncio.timeout_at(request.deadline_s):
                await self._prepare(request, streaming=streaming)
        except TimeoutError:
            self._active.expire(request)

    async def _prepare(self, request: Request, *, streaming: bool) -> None:
        """Fill in what the dispatcher must know and queue the request."""
        generation = request.generation
        adapter = generation.adapter
        published = BASE_MODEL if adapter is None else await self._resolver.resolve(adapter)
        prompt_ids = await self._tokenizer.encode(generation.prompt)
        if request.ended:  # by its deadline
            return
        limits = (self._max_context_tokens, self._dispatcher.max_context_tokens)
        request.version, request.rank, request.adapter_bytes = published
        request.prompt_ids = prompt_ids
        request.max_tokens = resolve_max_tokens(
            generation,
            num_prompt_tokens=len(prompt_ids),
            max_context_tokens=min(limit for limit in limits if limit is not None),
        )
        if not streaming:
            check_answer_size(generation, request.max_tokens, len(prompt_ids))
        self._dispatcher.enqueue(request, self._loop.time())
        self._fleet.plan_soon()
