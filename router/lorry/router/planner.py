"""The policies at work: who is sent where, who is aborted, and what is prefetched."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from lorry.router.actions import Abort, Prefetch
from lorry.router.backlog import Backlog
from lorry.router.open_workers import OpenWorkers
from lorry.router.policies import Policies
from lorry.router.request import Request
from lorry.router.worker import Worker, able

# Waiting requests that one plan looks at beyond those it can send, so that its time is bounded.
MAX_SET_ASIDE = 256
# A set of wanted versions that is this old may be out of date: ranking what waits costs more than
# a pick does.
PREFETCH_PERIOD_S = 0.1
MAX_AHEAD = 64  # requests that are ranked for it
SPARE_STARTS = 64  # that may be held beside twice as many as requests wait
RECHECK_S = 0.05  # after which a request is looked at again that is late and not aborted


class Send(NamedTuple):
    """The request leaves the backlog for the worker."""

    request: Request
    worker: Worker
    service_s: float  # to its first token, as predicted


class Planner:
    """Changes nothing but the policies' own state, `backlog`'s line and what `workers` prefetch."""

    def __init__(
        self,
        policies: Policies,
        backlog: Backlog,
        workers: Mapping[str, Worker],
        *,
        max_prefetch: int,
    ) -> None:
        self._policies = policies
        self._backlog = backlog
        self._workers = workers
        self._max_prefetch = max_prefetch
        self._latest_starts: list[tuple[float, int, Request]] = []  # a heap; some have left
        self._prefetched_s: float | None = None

    @property
    def next_plan_s(self) -> float | None:
        """When to plan again though nothing happens; None: need not be."""
        starts = self._latest_starts
        while starts and starts[0][2] not in self._backlog:
            heapq.heappop(starts)
        times = [starts[0][0]] if starts else []
        if self._prefetched_s is not None and len(self._backlog):
            times.append(self._prefetched_s + PREFETCH_PERIOD_S)
        return min(times, default=None)

    def able(self, request: Request) -> list[Worker]:
        return able(self._workers.values(), request)

    def arrive(self, request: Request, workers: Sequence[Worker], now_s: float) -> Abort | None:
        """Take a request that is about to be queued, and that `workers` are able to serve, into
        account, and look at it again when it must have been sent; an Abort: it should not be
        queued."""
        self._policies.reserve.arrived(request.tenant, now_s)
        service_s = self._service_s(request, workers, now_s)
        wait_s = self._wait_s(request, workers)
        late_s = now_s - request.arrival_s + service_s
        waits = self._backlog.order.waits_for_older
        request.predicted_ttft_s = late_s + (wait_s if waits else 0.0)
        tpot_s = self._policies.tpot.out_of_reach_s(request, workers)
        if tpot_s is not None:
            return Abort(request, late_s, tpot_s)
        if wait_s and not self._policies.admission.arrived(request, wait_s + service_s, now_s):
            return Abort(request, late_s + wait_s)
        latest_s = self._latest_start_s(request, service_s)
        if latest_s is not None:
            look_s = latest_s if latest_s <= now_s else max(latest_s, now_s + RECHECK_S)
            heapq.heappush(self._latest_starts, (look_s, request.number, request))
        return None

    def come_back(self, request: Request) -> None:
        """Look at a request that is queued again at the next plan."""
        if self._latest_start_s(request, 0.0) is not None:
            heapq.heappush(self._latest_starts, (0.0, request.number, request))

    def forget_left(self) -> None:
        """Let go of requests that have left the backlog, once they are the most that is held.

        Of one that came back and so is there twice, the earlier look is kept.
        """
        starts, backlog = self._latest_starts, self._backlog
        if len(starts) > 2 * len(backlog) + SPARE_STARTS:
            latest_first = sorted((entry for entry in starts if entry[2] in backlog), reverse=True)
            starts[:] = {entry[1]: entry for entry in latest_first}.values()
            heapq.heapify(starts)

    def aborts(self, now_s: float) -> list[Abort]:
        """Of those whose latest start has passed; where it has moved, look again then."""
        starts = self._latest_starts
        if not starts or starts[0][0] > now_s:
            return []
        aborts, later = list[Abort](), list[tuple[float, int, Request]]()
        while starts and starts[0][0] <= now_s:
            _, number, request = heapq.heappop(starts)
            if request in self._backlog:
                workers = self.able(request)
                service_s = self._service_s(request, workers, now_s)
                latest_s = self._latest_start_s(request, service_s) or 0.0
                # Beside an idle worker nobody could be sure that it is too late.
                if latest_s <= now_s and all(worker.active for worker in workers):
                    missed_s = self._policies.tpot.missed_s(request, workers)
                    ttft_s = now_s - request.arrival_s + service_s
                    aborts.append(Abort(request, ttft_s, missed_s))
                else:
                    later.append((max(latest_s, now_s + RECHECK_S), number, request))
        for entry in later:
            heapq.heappush(starts, entry)
        return aborts

    def sends(self, now_s: float) -> Iterator[Send | Abort]:
        """One after another; each must have been carried out before the next is asked for."""
        policies, backlog = self._policies, self._backlog
        backlog.overloaded = policies.admission.is_overloaded(now_s)
        if not len(backlog):
            return
        open_workers = OpenWorkers(
            self._workers.values(), policies.pacing, policies.reserve, policies.tpot
        )
        num_aside = 0
        most_rank = math.inf  # of a tenant that may have its turn while others are held
        while open_workers and num_aside < MAX_SET_ASIDE:
            request = backlog.first(now_s)
            if request is None:
                break
            rank = policies.fairness.tenant_rank(request.tenant)
            if rank > most_rank:
                break
            if open_workers.are_kept_from(request.tenant):
                most_rank = min(most_rank, rank + policies.reserve.max_lead_tokens)
                backlog.hold(request.tenant)
                num_aside += 1
                continue
            worker = policies.placement.place(request, open_workers.able(request))
            if worker is None:
                backlog.set_aside(request)
                num_aside += 1
                continue
            chosen = self._chosen(request, worker, now_s)
            action = self._send(chosen, worker, now_s)
            if isinstance(action, Abort):
                backlog.set_aside(chosen)
                num_aside += 1
            yield action
            open_workers.note_sent(worker)
        backlog.put_back()

    def prefetches(self, now_s: float) -> Iterator[Prefetch]:
        """The whole set of each worker, where it has changed; most urgent first."""
        if not self._max_prefetch:
            return
        since_s = self._prefetched_s
        if since_s is not None and since_s <= now_s < since_s + PREFETCH_PERIOD_S:
            return
        self._prefetched_s = now_s if len(self._backlog) else None
        if not len(self._backlog) and not any(w.prefetched for w in self._workers.values()):
            return
        wanted: dict[str, dict[bytes, None]] = {name: {} for name in self._workers}
        for request in self._backlog.ahead(now_s, MAX_AHEAD):
            worker = self._policies.placement.place(request, self.able(request))
            if worker is not None and request.version:
                wanted[worker.name][request.version] = None
        for name, all_versions in wanted.items():
            versions = tuple(islice(all_versions, self._max_prefetch))
            worker = self._workers[name]
            if worker.prefetched != versions:
                worker.prefetched = versions
                yield Prefetch(worker, versions)

    def check_integrity(self) -> None:
        starts = self._latest_starts
        assert len(starts) <= 2 * len(self._backlog) + SPARE_STARTS, "requests that left are held"

    def _chosen(self, request: Request, worker: Worker, now_s: float) -> Request:
        """Who goes to the worker now that it is the request's turn."""
        clustering = self._policies.clustering
        if not request.version or request.version in worker.num_requests:
            return request
        if self._backlog.is_overdue(request, now_s) or self._is_pressed(request, now_s):
            return request

        def preferred() -> Worker:
            return self._policies.placement.place(request, self.able(request)) or worker

        other = clustering.instead_of(request, worker, preferred, self._backlog)
        if other is None or self._is_greedier(other, request, worker):
            return request
        if not self._policies.tpot.keeps(other, worker):
            return request
        self._backlog.pass_over(request, now_s + clustering.max_wait_s)
        return other

    def _is_greedier(self, other: Request, request: Request, worker: Worker) -> bool:
        """Whether the other one's tenant has more of the worker than its share, and this one's
        has not."""
        is_over = self._policies.reserve.is_over
        return is_over(other.tenant, worker) and not is_over(request.tenant, worker)

    def _is_pressed(self, request: Request, now_s: float) -> bool:
        """Whether being passed over could cost it its objective."""
        ttft_s = request.slo.ttft_s
        wait_s = self._policies.clustering.max_wait_s
        return ttft_s is not None and request.arrival_s + ttft_s < now_s + 2 * wait_s

    def _send(self, request: Request, worker: Worker, now_s: float) -> Send | Abort:
        """An Abort if the worker would be too late and is not idle."""
        service_s = self._policies.predictor.service_s(request, worker, now_s)
        latest_s = self._latest_start_s(request, service_s)
        if latest_s is None or now_s <= latest_s or not worker.active:
            return Send(request, worker, service_s)
        return Abort(request, now_s - request.arrival_s + service_s)

    def _latest_start_s(self, request: Request, service_s: float) -> float | None:
        if request.output_ids:  # it comes back from a lost worker and has had its first token
            return None
        return self._policies.admission.latest_start_s(request, service_s)

    def _service_s(self, request: Request, workers: Sequence[Worker], now_s: float) -> float:
        """At the one of `workers` that it would go to."""
        worker = self._policies.placement.place(request, workers)
        return 0.0 if worker is None else self._policies.predictor.service_s(request, worker, now_s)

    def _wait_s(self, request: Request, workers: Sequence[Worker]) -> float:
        """In the line, behind all that are there."""
        if not len(self._backlog) and any(map(self._policies.pacing.has_room, workers)):
            return 0.0
        ahead = self._backlog.tokens_ahead(request.tenant)
        return self._policies.predictor.wait_s(ahead, workers)
