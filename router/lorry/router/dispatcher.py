"""Which request is where, and what to tell the workers next. No I/O and no clock.

The router reports what happens by the other methods and carries out what `plan` returns. Every
method leaves the state consistent, also when it raises.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from lorry.router.context_length import context_exceeded
from lorry.router.policies import Order, Placement
from lorry.router.queues import RETRY_AFTER_S, RequestQueues
from lorry.router.request import AT_WORKER, Request, RequestState
from lorry.router.worker import Worker
from lorry.rpc.errors import (
    AdapterIncompatible,
    ContextLengthExceeded,
    Draining,
    DuplicateRequest,
    NoWorker,
)

MAX_RESUBMITS = 2
# Waiting requests that one plan looks at beyond those it can send, so that its time is bounded.
MAX_SKIPPED = 256
S = RequestState


@dataclass(frozen=True, slots=True)
class Submit:
    worker: Worker
    seq: int
    request: Request


@dataclass(frozen=True, slots=True)
class Prefetch:
    worker: Worker
    versions: tuple[bytes, ...]


class Place(NamedTuple):
    """Where a request is at a worker."""

    worker_name: str
    seq: int


class Dispatcher:
    def __init__(
        self,
        queues: RequestQueues,
        order: Order,
        placement: Placement,
        *,
        max_prefetch: int,
    ) -> None:
        self._queues = queues
        self._order = order
        self._placement = placement
        self._max_prefetch = max_prefetch
        self._requests: dict[tuple[str, str], Request] = {}  # by tenant and request_id
        self._workers: dict[str, Worker] = {}
        self.num_requeued = 0
        self.draining = False

    @property
    def requests(self) -> list[Request]:
        """All requests that have not ended."""
        return list(self._requests.values())

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def receive(self, request: Request) -> None:
        """Give an arriving request its place in the queue, or raise why it is refused."""
        if self.draining:
            raise Draining("the router is shutting down", retry_after_s=RETRY_AFTER_S)
        if not any(worker.accepting for worker in self._workers.values()):
            raise no_worker()
        generation = request.generation
        key = (generation.tenant, generation.request_id)
        if key in self._requests:
            raise DuplicateRequest(
                f"request_id {generation.request_id!r} is that of an active request",
                requestId=generation.request_id,
            )
        self._queues.take_place(request)
        self._requests[key] = request

    def enqueue(self, request: Request) -> None:
        """Queue a request that is now complete; raises if no attached worker could serve it."""
        if not self._able(request):
            raise self._why_unable(request)
        request.move_to(S.QUEUED)
        self._queues.add(request)

    def end(self, request: Request, state: RequestState) -> Place | None:
        """Free all that the request holds; returns where a Cancel must be sent."""
        place = Place(request.worker_name, request.seq) if request.state in AT_WORKER else None
        request.move_to(state)
        self._queues.remove(request)
        self._leave_worker(request)
        del self._requests[request.tenant, request.generation.request_id]
        return None if state is S.FINISHED else place

    def attach(self, worker: Worker) -> None:
        assert worker.name not in self._workers, f"worker {worker.name} is attached already"
        self._workers[worker.name] = worker

    def lose(self, worker: Worker) -> list[Request]:
        """Forget a worker and queue its requests again; returns those that cannot be."""
        del self._workers[worker.name]
        return [request for request in list(worker.active.values()) if not self.requeue(request)]

    def requeue(self, request: Request, *, lost: bool = True) -> bool:
        """Queue a request again that its worker gave up, unless it was lost too often.

        Output that it already has goes with it. False also if nothing is left to generate.
        """
        if request.state is S.STOPPING or request.output_complete:
            return False
        if lost:
            if request.num_losses >= MAX_RESUBMITS:
                return False
            request.num_losses += 1
        self.num_requeued += 1
        self._leave_worker(request)
        request.move_to(S.QUEUED)
        self._queues.add(request)
        return True

    def stranded(self) -> list[Request]:
        """Queued requests that no attached worker can serve."""
        return [r for r in self.requests if r.state is S.QUEUED and not self._able(r)]

    def plan(self) -> list[Submit | Prefetch]:
        """What to send now. It is taken as sent."""
        return [*self._plan_submits(), *self._plan_prefetches()]

    def check_integrity(self) -> None:
        """Every request is in exactly one place."""
        self._queues.check_integrity()
        at_workers = [r for worker in self._workers.values() for r in worker.active.values()]
        assert len(set(at_workers)) == len(at_workers)
        active = set(self._requests.values())
        assert set(at_workers) == {r for r in active if r.state in AT_WORKER}
        assert len(self._queues) == len(active) - len(at_workers)
        assert not any(request.ended for request in active)
        for worker in self._workers.values():
            assert worker.num_requests == Counter(r.version for r in worker.active.values())

    @property
    def max_context_tokens(self) -> int | None:
        """Of the worker that takes the longest requests; None if there is none."""
        ready = [w.max_context_tokens for w in self._workers.values() if w.accepting]
        return max(ready, default=None)

    def _able(self, request: Request) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.can_serve(request)]

    def _plan_submits(self) -> list[Submit]:
        submits: list[Submit] = []
        room = sum(w.submit_limit - w.num_submitted for w in self._workers.values() if w.has_room)
        if room:
            for request in islice(self._order.order(self._queues), room + MAX_SKIPPED):
                able = [worker for worker in self._able(request) if worker.has_room]
                worker = self._placement.place(request, able)
                if worker is not None:
                    submits.append(Submit(worker, worker.add(request), request))
                if len(submits) == room:
                    break
        for submit in submits:
            self._queues.remove(submit.request)
            submit.request.move_to(S.SUBMITTED)
            submit.request.worker_name, submit.request.seq = submit.worker.name, submit.seq
        return submits

    def _plan_prefetches(self) -> Iterator[Prefetch]:
        """The whole set of each worker, where it has changed."""
        wanted: dict[str, dict[bytes, None]] = {name: {} for name in self._workers}
        for request in islice(self._order.order(self._queues), MAX_SKIPPED):
            worker = self._placement.place(request, self._able(request))
            if worker is not None and request.version:
                wanted[worker.name][request.version] = None
        for name, all_versions in wanted.items():
            versions = tuple(islice(all_versions, self._max_prefetch))
            worker = self._workers[name]
            if worker.prefetched != versions:
                worker.prefetched = versions
                yield Prefetch(worker, versions)

    def _leave_worker(self, request: Request) -> None:
        worker = self._workers.get(request.worker_name)
        if worker is not None:
            worker.remove(request)
        request.worker_name, request.seq = "", 0

    def _why_unable(
        self, request: Request
    ) -> AdapterIncompatible | ContextLengthExceeded | NoWorker:
        ready = [worker for worker in self._workers.values() if worker.accepting]
        if not ready:
            return no_worker()
        max_rank = max(worker.max_rank for worker in ready)
        if request.rank > max_rank:
            return AdapterIncompatible(
                f"adapter {request.generation.adapter} has rank {request.rank}; "
                f"the workers serve at most {max_rank}",
                rank=request.rank,
                maxRank=max_rank,
            )
        able = [worker for worker in ready if worker.max_rank >= request.rank]
        return context_exceeded(
            "stopping.max_tokens",
            len(request.prompt_ids),
            request.max_tokens,
            max(worker.max_context_tokens for worker in able),
        )


def no_worker() -> NoWorker:
    return NoWorker("no worker is attached", retry_after_s=RETRY_AFTER_S)
