"""Which request is where, and what to tell the workers next. No I/O and no clock.

The router reports what happens by the other methods and carries out what `plan` returns: when
anything has changed, and by `next_plan_s` at the latest. Every method leaves the state consistent,
also when it raises.
"""

from typing import NamedTuple

from lorry.router.actions import Action, Submit
from lorry.router.backlog import Backlog
from lorry.router.places import RETRY_AFTER_S, Places
from lorry.router.planner import Planner, Send
from lorry.router.policies import Policies
from lorry.router.predictor import PredictionErrors
from lorry.router.rates import RateLimits, unlimited
from lorry.router.refusals import no_worker, slo_unattainable, unable
from lorry.router.request import AT_WORKER, Request, RequestState
from lorry.router.worker import Worker, WorkerStatus
from lorry.rpc.errors import Draining, DuplicateRequest

MAX_RESUBMITS = 2
CHARGE_TOKENS = 16  # output tokens that are counted as service at once
S = RequestState


class Place(NamedTuple):
    """Where a request is at a worker."""

    worker_name: str
    seq: int


class Dispatcher:
    def __init__(
        self,
        places: Places,
        policies: Policies,
        *,
        max_prefetch: int,
        rates: RateLimits | None = None,
    ) -> None:
        self._places = places
        self._rates = rates or unlimited()
        self._policies = policies
        self._backlog = Backlog(policies.order, policies.overload_order, policies.fairness)
        self._predictor = policies.predictor
        self._requests: dict[tuple[str, str], Request] = {}  # by tenant and request_id
        self._workers: dict[str, Worker] = {}
        self._planner = Planner(policies, self._backlog, self._workers, max_prefetch=max_prefetch)
        self.num_requeued = 0
        self.draining = False

    @property
    def requests(self) -> list[Request]:
        """All requests that have not ended."""
        return list(self._requests.values())

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def overloaded(self) -> bool:
        """Whether more waits than can be served in time, as of the last plan."""
        return self._backlog.overloaded

    @property
    def prediction_errors(self) -> PredictionErrors:
        return self._predictor.errors

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
        self._rates.check(request.tenant, request.arrival_s)
        self._places.take(request)
        self._rates.count_request(request.tenant)
        self._requests[key] = request

    def enqueue(self, request: Request, now_s: float) -> None:
        """Queue a request that is now complete.

        Raises if no attached worker could serve it, and SloUnattainable if it would be too late.
        """
        workers = self._planner.able(request)
        if not workers:
            raise unable(request, self._workers.values())
        abort = self._planner.arrive(request, workers, now_s)
        if abort is not None:
            raise slo_unattainable(abort)
        self._rates.count_tokens(request.tenant, len(request.prompt_ids))
        self._queue(request)

    def end(self, request: Request, state: RequestState) -> Place | None:
        """Free all that the request holds; returns where a Cancel must be sent."""
        place = Place(request.worker_name, request.seq) if request.state in AT_WORKER else None
        request.move_to(state)
        self._places.free(request)
        self._backlog.remove(request)
        self._planner.forget_left()
        self._leave_worker(request)
        del self._requests[request.tenant, request.generation.request_id]
        return None if state is S.FINISHED else place

    def attach(self, worker: Worker) -> None:
        assert worker.name not in self._workers, f"worker {worker.name} is attached already"
        self._workers[worker.name] = worker

    def lose(self, worker: Worker) -> list[Request]:
        """Forget a worker and queue its requests again; returns those that cannot be."""
        del self._workers[worker.name]
        self._predictor.forget(worker)
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
        self._queue(request)
        self._planner.come_back(request)
        return True

    def stranded(self) -> list[Request]:
        """Queued requests that no attached worker can serve."""
        return [r for r in self.requests if r.state is S.QUEUED and not self._planner.able(r)]

    def hear(self, worker: Worker, status: WorkerStatus, now_s: float) -> None:
        """Take a worker's status."""
        self._predictor.advance(worker, now_s)
        worker.hear(status)

    def drew(self, request: Request, now_s: float) -> None:
        """A token was added to the output of a request at a worker; on the hot path."""
        if request.state is S.SUBMITTED:
            self._begin(request, now_s)
        elif request in self._predictor.pilots:
            self._predictor.draw(request, now_s)
        if len(request.output_ids) - request.num_charged >= CHARGE_TOKENS:
            self._charge_output(request)

    def plan(self, now_s: float) -> list[Action]:
        """What to do now. All but an Abort is taken as done."""
        aborts = self._planner.aborts(now_s)
        for abort in aborts:
            self._policies.admission.aborted(abort.request, now_s)
            self._backlog.set_aside(abort.request)
        actions: list[Action] = [*aborts]
        for action in self._planner.sends(now_s):
            actions.append(self._submit(action, now_s) if isinstance(action, Send) else action)
        self._planner.forget_left()
        num_submitted = sum([isinstance(action, Submit) for action in actions])
        self._policies.admission.planned(len(self._backlog), num_submitted, now_s)
        actions += self._planner.prefetches(now_s)
        return actions

    @property
    def next_plan_s(self) -> float | None:
        """When to plan again though nothing happens; None: need not be."""
        return self._planner.next_plan_s

    def check_integrity(self) -> None:
        """Every request is in exactly one place."""
        self._places.check_integrity()
        self._backlog.check_integrity()
        self._planner.check_integrity()
        at_workers = [r for worker in self._workers.values() for r in worker.active.values()]
        assert len(set(at_workers)) == len(at_workers)
        active = set(self._requests.values())
        assert set(at_workers) == {r for r in active if r.state in AT_WORKER}
        assert len(self._places) == len(active) - len(at_workers)
        assert set(self._backlog) == {r for r in active if r.state is S.QUEUED}
        assert not any(request.ended for request in active)
        for worker in self._workers.values():
            worker.check_integrity()

    @property
    def max_context_tokens(self) -> int | None:
        """Of the worker that takes the longest requests; None if there is none."""
        ready = [w.max_context_tokens for w in self._workers.values() if w.accepting]
        return max(ready, default=None)

    def _queue(self, request: Request) -> None:
        request.move_to(S.QUEUED)
        self._places.keep(request)
        self._backlog.add(request)

    def _begin(self, request: Request, now_s: float) -> None:
        worker = self._workers[request.worker_name]
        self._predictor.begin(request, worker, now_s)
        if len(request.output_ids) == 1:  # else it had others from a worker that was lost
            self._policies.admission.began(request, now_s - request.arrival_s)
        worker.begin(request)
        request.move_to(S.STREAMING)

    def _submit(self, send: Send, now_s: float) -> Submit:
        request, worker = send.request, send.worker
        self._places.free(request)
        self._backlog.remove(request)
        self._backlog.charge(request, prompt_tokens=request.num_known_tokens, output_tokens=0)
        self._predictor.advance(worker, now_s)
        request.move_to(S.SUBMITTED)
        request.worker_name, request.seq = worker.name, worker.add(request)
        request.last_submit_s, request.predicted_service_s = now_s, send.service_s
        return Submit(worker, request.seq, request)

    def _charge_output(self, request: Request) -> None:
        output_tokens = len(request.output_ids) - request.num_charged
        if not output_tokens:
            return
        request.num_charged = len(request.output_ids)
        worker = self._workers.get(request.worker_name)
        if worker is not None:
            worker.usage.grow(request.tenant, output_tokens)
        self._rates.count_tokens(request.tenant, output_tokens)
        self._backlog.charge(request, prompt_tokens=0, output_tokens=output_tokens)

    def _leave_worker(self, request: Request) -> None:
        self._charge_output(request)
        worker = self._workers.get(request.worker_name)
        if worker is not None:
            worker.remove(request)
            self._predictor.leave(request)
        request.worker_name, request.seq = "", 0
