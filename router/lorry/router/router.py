"""Carries requests from clients to workers and their tokens back.

    receive → resolve, tokenize → queue → submit → draw tokens → end

The dispatcher decides. This class tells it what happens, does what it plans, and ends every request
exactly once, whoever is first: the worker, the client, the deadline or the router itself.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from lorry.router.catalogue import AdapterVersion
from lorry.router.config import Config
from lorry.router.context_length import resolve_max_tokens
from lorry.router.dispatcher import Dispatcher, Place, Prefetch, Submit, no_worker
from lorry.router.generation import Completion, FinishReason, Generation
from lorry.router.output import Output
from lorry.router.request import Request, RequestState
from lorry.router.text_stream import TextStream
from lorry.router.tokenizer import Tokenizer
from lorry.router.worker import Worker
from lorry.router.worker_link import Ended
from lorry.rpc.errors import (
    DeadlineExpired,
    Draining,
    Interrupted,
    LorryError,
    SlowReader,
    WorkerLost,
)
from lorry.rpc.names import AdapterName

BASE_MODEL = AdapterVersion(version=b"", rank=0)
S = RequestState

log = logging.getLogger(__name__)


class Resolver(Protocol):
    async def resolve(self, name: AdapterName) -> AdapterVersion: ...


class Link(Protocol):
    """What can be told to a worker; dropped while it is not attached."""

    def submit(self, submit: Submit) -> None: ...
    def cancel(self, place: Place) -> None: ...
    def prefetch(self, prefetch: Prefetch) -> None: ...


@dataclass(frozen=True, slots=True)
class Active:
    """What belongs to a request until it ends."""

    output: Output
    deadline: asyncio.TimerHandle


class Router:
    """`links` is filled by the owner, by the workers' names."""

    def __init__(
        self,
        config: Config,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        resolver: Resolver,
        *,
        max_context_tokens: int,
        on_workers: Callable[[int], None],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._resolver = resolver
        self._max_context_tokens = max_context_tokens
        self._on_workers = on_workers
        self._loop = asyncio.get_running_loop()
        self._active: dict[Request, Active] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._plan_handle: asyncio.Handle | None = None
        self._stranded_handle: asyncio.TimerHandle | None = None
        self.links: dict[str, Link] = {}

    # For clients

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
        when_client_left(lambda: self._end(request, S.CANCELLED))
        try:
            await self._prepare(request)
            yield output
        except LorryError:
            self._end(request, S.FAILED)
            raise
        finally:
            self._end(request, S.CANCELLED)

    async def watch_clients(self) -> None:
        """End the requests of clients that stopped reading, until cancelled."""
        while True:
            await asyncio.sleep(self._config.client_stall_s / 4)
            latest_s = self._loop.time() - self._config.client_stall_s
            for request, active in list(self._active.items()):
                if active.output.taken_s is not None and active.output.taken_s < latest_s:
                    self._fail(request, _slow_reader(f"for {self._config.client_stall_s:g} s"))

    async def drain(self) -> None:
        """Take no new requests; return when none runs, or end what still runs after the grace."""
        self._dispatcher.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_grace_s):
                await self._idle.wait()
        for request in list(self._active):
            self._give_up(request, Draining("the router is shutting down"), Interrupted)

    def _receive(
        self, generation: Generation, remaining_s: float | None, *, streaming: bool
    ) -> tuple[Request, Output]:
        now_s, life_s = self._loop.time(), self._config.max_request_s
        request = Request(
            generation,
            seed=random.getrandbits(64) if generation.seed is None else generation.seed,
            arrival_s=now_s,
            deadline_s=now_s + (life_s if remaining_s is None else min(remaining_s, life_s)),
        )
        self._dispatcher.receive(request)
        text = TextStream(
            self._tokenizer.table,
            stop_strings=generation.stop_strings,
            stop_token_ids=generation.stop_token_ids,
            min_tokens=generation.min_tokens,
        )
        output = Output(text, streaming=streaming)
        deadline = self._loop.call_at(request.deadline_s, self._expire, request)
        self._active[request] = Active(output, deadline)
        self._idle.clear()
        return request, output

    async def _prepare(self, request: Request) -> None:
        generation = request.generation
        adapter = generation.adapter
        published = BASE_MODEL if adapter is None else await self._resolver.resolve(adapter)
        prompt_ids = await self._tokenizer.encode(generation.prompt)
        if request.ended:  # by its deadline
            return
        request.version, request.rank = published
        request.prompt_ids = prompt_ids
        request.max_tokens = resolve_max_tokens(
            generation,
            num_prompt_tokens=len(prompt_ids),
            max_context_tokens=min(
                self._max_context_tokens,
                self._dispatcher.max_context_tokens or self._max_context_tokens,
            ),
        )
        self._dispatcher.enqueue(request)
        self._plan_soon()

    # From workers

    def worker_attached(self, worker: Worker) -> None:
        self._dispatcher.attach(worker)
        self._workers_changed()

    def worker_lost(self, worker: Worker) -> None:
        log.info("worker %s lost with %d requests", worker.name, worker.load)
        for request in self._dispatcher.lose(worker):
            self._cannot_resubmit(request)
        self._workers_changed()

    def worker_draining(self, worker: Worker) -> None:
        self._workers_changed()

    def submit_limit_raised(self, worker: Worker) -> None:
        self._plan_soon()

    def tokens_drawn(self, worker: Worker, seqs: Sequence[int], token_ids: Sequence[int]) -> None:
        active = worker.active
        for seq, token_id in zip(seqs, token_ids, strict=True):
            request = active.get(seq)
            if request is not None and request.state is not S.STOPPING:
                self._draw(request, token_id)

    def requests_ended(self, worker: Worker, ended: Sequence[Ended]) -> None:
        for end in ended:
            request = worker.active.get(end.seq)
            if request is None:
                continue
            if end.reason is not None or request.state is S.STOPPING:
                self._complete(request, end)
            elif end.error is not None and end.error.code is not grpc.StatusCode.UNAVAILABLE:
                self._fail(request, end.error)
            else:
                worker.draining = worker.draining or isinstance(end.error, Draining)
                self._resubmit(request)

    def _draw(self, request: Request, token_id: int) -> None:
        """The hot path: once for each output token."""
        if request.state is S.SUBMITTED:
            request.move_to(S.STREAMING)
            request.first_token_s = request.first_token_s or self._loop.time()
        request.output_ids.append(token_id)
        output = self._active[request].output
        output.push(token_id)
        if output.matched_stop is not None:
            request.move_to(S.STOPPING)
            self.links[request.worker_name].cancel(Place(request.worker_name, request.seq))
        elif output.num_unsent > self._config.max_unsent_tokens:
            self._fail(request, _slow_reader(f"with {output.num_unsent} tokens unread"))

    # How requests end

    def _complete(self, request: Request, end: Ended | None) -> None:
        output = self._active[request].output
        output.flush()
        completion = _completion(request, output.matched_stop, end)
        self._end(request, S.FINISHED)
        output.complete(completion)

    def _resubmit(self, request: Request) -> None:
        if self._dispatcher.requeue(request):
            self._workers_changed()
        else:
            self._cannot_resubmit(request)

    def _cannot_resubmit(self, request: Request) -> None:
        if request.state is S.STOPPING or request.output_complete:
            self._complete(request, None)
        else:
            self._fail(request, _mid_stream(WorkerLost, self._active[request].output.num_sent))

    def _fail_stranded(self) -> None:
        for request in self._dispatcher.stranded():
            self._give_up(request, no_worker(), WorkerLost)

    def _give_up(
        self, request: Request, error: LorryError, mid_stream: type[WorkerLost | Interrupted]
    ) -> None:
        """End with `error`, which lets the client try again, only if it has received nothing."""
        num_sent = self._active[request].output.num_sent
        self._fail(request, _mid_stream(mid_stream, num_sent) if num_sent else error)

    def _expire(self, request: Request) -> None:
        waited_s = self._loop.time() - request.arrival_s
        self._fail(
            request,
            DeadlineExpired(
                f"the deadline passed after {waited_s:.3f} s, in state {request.state.name}",
                state=request.state.name,
                waitedS=f"{waited_s:.3f}",
            ),
        )

    def _fail(self, request: Request, error: LorryError) -> None:
        output = self._active[request].output
        self._end(request, S.FAILED)
        output.fail(error)

    def _end(self, request: Request, state: RequestState) -> None:
        """Free everything. Does nothing if the request has ended."""
        active = self._active.pop(request, None)
        if active is None:
            return
        active.deadline.cancel()
        place = self._dispatcher.end(request, state)
        if place is not None:
            self.links[place.worker_name].cancel(place)
        if not self._active:
            self._idle.set()
        self._plan_soon()
        log.debug("request %s %s", request.generation, state.name)

    # What follows

    def _workers_changed(self) -> None:
        """Plan again; requests that no worker can serve now wait for one, but not for long."""
        self._on_workers(sum(not worker.draining for worker in self._dispatcher.workers))
        if self._stranded_handle is not None:
            self._stranded_handle.cancel()
        wait_s = self._config.worker_wait_s
        self._stranded_handle = self._loop.call_later(wait_s, self._fail_stranded)
        self._plan_soon()

    def _plan_soon(self) -> None:
        """Plan once for all that happens in this turn of the event loop."""
        if self._plan_handle is None:
            self._plan_handle = self._loop.call_soon(self._plan)

    def _plan(self) -> None:
        self._plan_handle = None
        for action in self._dispatcher.plan():
            link = self.links[action.worker.name]
            if isinstance(action, Prefetch):
                link.prefetch(action)
            else:
                request = action.request
                request.submitted_s = request.submitted_s or self._loop.time()
                link.submit(action)


def _completion(request: Request, stop_string: str | None, end: Ended | None) -> Completion:
    by_token = request.ended_by_token and stop_string is None
    stopped = by_token or stop_string is not None or (end and end.reason is FinishReason.STOP)
    assert request.submitted_s is not None
    return Completion(
        request_id=request.generation.request_id,
        reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        stop_string=stop_string,
        stop_token_id=request.output_ids[-1] if by_token else None,
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=len(request.output_ids),
        cached_tokens=end.cached_tokens if end else 0,
        adapter=request.generation.adapter,
        version=request.version,
        queue_s=request.submitted_s - request.arrival_s,
        adapter_load_s=end.adapter_load_s if end else 0.0,
        prefill_s=end.prefill_s if end else 0.0,
        ttft_s=request.first_token_s - request.arrival_s if request.first_token_s else 0.0,
    )


def _mid_stream(cls: type[WorkerLost | Interrupted], num_sent: int) -> LorryError:
    return cls(f"the output was cut off after {num_sent} tokens", sentTokens=num_sent)


def _slow_reader(how: str) -> SlowReader:
    return SlowReader(f"the client has read too little {how}")
