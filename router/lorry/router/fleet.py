"""The workers: what they say reaches the requests, and what is planned reaches them."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import grpc

from lorry.router.actions import Abort, Prefetch, Submit
from lorry.router.active import ActiveRequests
from lorry.router.config import Config
from lorry.router.dispatcher import Dispatcher, Place
from lorry.router.generation import Logprobs, PromptLogprobs, TokenLogprobs
from lorry.router.output import Output
from lorry.router.refusals import no_worker, slo_unattainable
from lorry.router.request import Request, RequestState
from lorry.router.worker import Worker, WorkerStatus
from lorry.router.worker_messages import Ended
from lorry.rpc.errors import Draining, LorryError, SlowReader, WorkerLost

STRANDED_LOOK_S = 0.05  # in which all that happens to workers is looked at once
S = RequestState

log = logging.getLogger(__name__)


class Link(Protocol):
    """What can be told to a worker; dropped while it is not attached."""

    def submit(self, submit: Submit) -> None: ...
    def cancel(self, place: Place) -> None: ...
    def prefetch(self, prefetch: Prefetch) -> None: ...


class Fleet:
    """Hears the links' events. `connect` gives it the links, by the workers' names."""

    def __init__(
        self,
        config: Config,
        dispatcher: Dispatcher,
        active: ActiveRequests,
        *,
        on_workers: Callable[[int], None],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._active = active
        self._counts = active.counts
        self._on_workers = on_workers
        self._loop = asyncio.get_running_loop()
        self._links: Mapping[str, Link] = {}
        self._plan_handle: asyncio.Handle | None = None
        self._later_handle: asyncio.TimerHandle | None = None
        self._stranded_handle: asyncio.TimerHandle | None = None
        self._stranded_s: dict[Request, float] = {}  # since when
        active.when_ended = self._request_ended

    def connect(self, links: Mapping[str, Link]) -> None:
        self._links = links

    @property
    def worker_names(self) -> list[str]:
        """Of all workers that there should be, attached or not."""
        return list(self._links)

    def plan_soon(self) -> None:
        """Plan once for all that happens in this turn of the event loop."""
        if self._plan_handle is None:
            self._plan_handle = self._loop.call_soon(self._plan)

    def worker_attached(self, worker: Worker) -> None:
        self._dispatcher.attach(worker)
        self._workers_changed()

    def worker_lost(self, worker: Worker) -> None:
        self._counts.workers_lost += 1
        log.info("worker %s lost with %d requests", worker.name, worker.load)
        for request in self._dispatcher.lose(worker):
            self._end_without_worker(request)
        self._workers_changed()

    def worker_changed(self, worker: Worker) -> None:
        self._workers_changed()

    def status_heard(self, worker: Worker, status: WorkerStatus) -> None:
        self._dispatcher.hear(worker, status, self._loop.time())
        self.plan_soon()

    def submit_limit_raised(self, worker: Worker) -> None:
        self.plan_soon()

    def tokens_drawn(
        self,
        worker: Worker,
        seqs: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
    ) -> None:
        active, now_s = worker.active, self._loop.time()
        rows: Sequence[TokenLogprobs | None] = logprobs or [None] * len(seqs)
        for seq, token_id, row in zip(seqs, token_ids, rows, strict=True):
            request = active.get(seq)
            if request is not None and request.state is not S.STOPPING:
                self._draw(request, token_id, row, now_s)

    def prompt_logprobs_read(
        self, worker: Worker, seq: int, first_index: int, logprobs: Logprobs
    ) -> None:
        request = worker.active.get(seq)
        if request is None or not request.awaits_prompt_logprobs:
            return
        next_index = request.num_prompt_logprobs + 1
        if first_index > next_index:
            message = f"the worker left out logprobs of prompt tokens {next_index} to {first_index}"
            self._active.fail(request, LorryError(message))
            return
        token_ids = request.prompt_ids[first_index:][: len(logprobs.logprobs)]
        part = PromptLogprobs(first_index, token_ids, *logprobs)
        part = part.after(next_index - first_index)  # a worker that was lost has sent the others
        if part.logprobs:
            request.num_prompt_logprobs += len(part.logprobs)
            output = self._active.output(request)
            output.push_prompt(part)
            self._check_unsent(request, output)

    def requests_ended(self, worker: Worker, ended: Sequence[Ended]) -> None:
        for last_word in ended:
            request = worker.active.get(last_word.seq)
            if request is not None:
                self._end_by_worker(worker, request, last_word)

    def _draw(
        self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now_s: float
    ) -> None:
        """The hot path: once for each output token."""
        if request.generation.top_logprobs is None:
            logprobs = None
        elif logprobs is None:
            self._active.fail(request, LorryError("the worker sent a token without its logprobs"))
            return
        if request.state is S.SUBMITTED and request.awaits_prompt_logprobs:
            message = "the worker sent a token before the logprobs of its prompt"
            self._active.fail(request, LorryError(message))
            return
        self._counts.draw(request, now_s)
        request.output_ids.append(token_id)
        self._dispatcher.drew(request, now_s)
        output = self._active.output(request)
        output.push(token_id, logprobs)
        if output.matched_stop is not None:
            request.move_to(S.STOPPING)
            self._links[request.worker_name].cancel(Place(request.worker_name, request.seq))
        else:
            self._check_unsent(request, output)

    def _check_unsent(self, request: Request, output: Output) -> None:
        if output.num_unsent > self._config.max_unsent_tokens:
            message = f"the client has left {output.num_unsent} tokens unread"
            self._active.fail(request, SlowReader(message))

    def _end_by_worker(self, worker: Worker, request: Request, last_word: Ended) -> None:
        error = last_word.error
        if last_word.reason is not None or request.state is S.STOPPING:
            self._active.complete(request, last_word)
        elif error is not None and self._is_final(request, error):
            self._active.fail(request, error)
        else:
            drained = isinstance(error, Draining)
            worker.draining |= drained
            if not self._dispatcher.requeue(request, lost=not drained):
                self._end_without_worker(request)
            self._workers_changed()

    def _is_final(self, request: Request, error: LorryError) -> bool:
        """Whether a worker's error is the client's, and not a reason to submit the request again.

        A client that has received nothing can try again itself, as UNAVAILABLE tells it.
        """
        if isinstance(error, Draining):
            return False
        unavailable = error.code is grpc.StatusCode.UNAVAILABLE
        return not (unavailable and self._active.output(request).has_sent)

    def _end_without_worker(self, request: Request) -> None:
        if request.state is S.STOPPING or request.output_complete:
            self._active.complete(request, None)
        else:
            self._active.cut_off(request, WorkerLost)

    def _workers_changed(self) -> None:
        """Plan again; requests that no worker can serve now wait for one, but not for long."""
        self._on_workers(sum(worker.accepting for worker in self._dispatcher.workers))
        self._check_stranded_by(self._loop.time() + STRANDED_LOOK_S)
        self.plan_soon()

    def _check_stranded_by(self, time_s: float) -> None:
        handle = self._stranded_handle
        if handle is not None:
            if handle.when() <= time_s:
                return
            handle.cancel()
        self._stranded_handle = self._loop.call_at(time_s, self._check_stranded)

    def _check_stranded(self) -> None:
        """Give up what has been stranded for too long, and look again when the next will have."""
        self._stranded_handle = None
        now_s, wait_s = self._loop.time(), self._config.worker_wait_s
        since_s = {r: self._stranded_s.get(r, now_s) for r in self._dispatcher.stranded()}
        expired = [request for request, start_s in since_s.items() if start_s + wait_s <= now_s]
        for request in expired:
            del since_s[request]
            self._active.give_up(request, no_worker(), WorkerLost)
        self._stranded_s = since_s
        if since_s:
            self._check_stranded_by(min(since_s.values()) + wait_s)

    def _request_ended(self, place: Place | None) -> None:
        if place is not None:
            self._links[place.worker_name].cancel(place)
        self.plan_soon()

    def _plan(self) -> None:
        self._plan_handle = None
        for action in self._dispatcher.plan(self._loop.time()):
            if isinstance(action, Submit):
                self._submit(action)
            elif isinstance(action, Prefetch):
                self._links[action.worker.name].prefetch(action)
            else:
                self._abort(action)
        self._plan_by(self._dispatcher.next_plan_s)

    def _plan_by(self, time_s: float | None) -> None:
        if self._later_handle is not None:
            self._later_handle.cancel()
        self._later_handle = None if time_s is None else self._loop.call_at(time_s, self.plan_soon)

    def _submit(self, submit: Submit) -> None:
        request = submit.request
        if request.submitted_s is None:
            request.submitted_s = self._loop.time()
            self._counts.submit(request, request.submitted_s)
        self._links[submit.worker.name].submit(submit)

    def _abort(self, abort: Abort) -> None:
        self._active.fail(abort.request, slo_unattainable(abort))
