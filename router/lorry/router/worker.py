"""What the router knows of one attached worker."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lorry.router.queue import Queues
from lorry.router.request import Request
from lorry.router.usage import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What a worker tells every second, of all routers together; 0 or empty: not measured yet."""

    running: int = 0  # requests with pages
    waiting: int = 0  # requests without
    queued_prompt_tokens: int = 0  # not yet computed
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0  # of prefixes that no request uses
    pages_adapter: int = 0
    pages_adapter_idle: int = 0  # of those, of adapters that no request uses
    prefill_tokens_per_s: float = 0.0  # by what one more prompt token adds to a step
    step_s: Sequence[tuple[int, float]] = ()  # rows, ascending, and the time of their decode step
    adapter_load_bytes_per_s: float = 0.0

    @property
    def pages_used(self) -> int:
        """That no other request could have."""
        return self.pages_total - self.pages_free - self.pages_cached - self.pages_adapter_idle


NO_STATUS = WorkerStatus()


@dataclass(slots=True, eq=False)
class Worker:
    """One stream to a worker, from its Welcome on. A new stream is a new `Worker`."""

    name: str  # its address
    epoch: int
    max_context_tokens: int
    max_rank: int
    submit_limit: int  # Submits that the stream may have sent in all
    max_running: int = 0  # requests with pages at a time; 0: not known
    step_tokens: int = 0  # that one step computes; 0: not known
    draining: bool = False
    listed: bool = True  # discovery still knows it
    num_submitted: int = 0
    active: dict[int, Request] = field(default_factory=dict)  # by seq
    unstarted: dict[Request, int] = field(default_factory=dict)  # their tokens; no output came yet
    unstarted_tokens: int = 0
    num_requests: Counter[bytes] = field(default_factory=Counter)  # of `active`, by version
    queues: dict[bytes, Queues] = field(default_factory=dict)  # of those versions' adapters
    num_tpots: Counter[float] = field(default_factory=Counter)  # of `active`, by what they ask for
    tightest_tpot_s: float = math.inf  # the least of them
    gpu: set[bytes] = field(default_factory=set)  # versions usable by the next step
    host: set[bytes] = field(default_factory=set)  # versions in host memory
    prefetched: tuple[bytes, ...] = ()  # versions of the last Prefetch
    status: WorkerStatus = NO_STATUS  # its last one
    usage: Usage = field(default_factory=Usage)

    @property
    def accepting(self) -> bool:
        """Whether it takes new requests at all."""
        return self.listed and not self.draining

    @property
    def has_room(self) -> bool:
        return self.num_submitted < self.submit_limit and self.accepting

    @property
    def load(self) -> int:
        """Requests of this router that it works on."""
        return len(self.active)

    def can_serve(self, request: Request) -> bool:
        """Whether it could ever take the request."""
        return bool(able([self], request))

    def hear(self, status: WorkerStatus) -> None:
        self.status = status
        num_requests = status.running + status.waiting
        self.usage.told(num_requests, status.pages_used, self.unstarted_tokens)

    def raise_submit_limit(self, limit: int) -> None:
        """A smaller limit changes nothing."""
        self.submit_limit = max(self.submit_limit, limit)

    def add(self, request: Request) -> int:
        """Number the request on this stream."""
        assert self.has_room, f"worker {self.name} takes no Submit beyond {self.submit_limit}"
        num_tokens = request.num_known_tokens
        self.num_submitted += 1
        self.active[self.num_submitted] = request
        self.unstarted[request] = num_tokens
        self.unstarted_tokens += num_tokens
        self.num_requests[request.version] += 1
        if request.version:
            self.queues[request.version] = request.queue.of_version
        self.usage.add(request.tenant, request.num_charged_tokens)
        if request.slo.tpot_s is not None:
            self.num_tpots[request.slo.tpot_s] += 1
            self.tightest_tpot_s = min(self.tightest_tpot_s, request.slo.tpot_s)
        return self.num_submitted

    def begin(self, request: Request) -> None:
        """Its output has begun. Does nothing if that is known."""
        self.unstarted_tokens -= self.unstarted.pop(request, 0)

    def remove(self, request: Request) -> None:
        """Does nothing if it does not work on the request."""
        if self.active.get(request.seq) is not request:
            return
        del self.active[request.seq]
        self.begin(request)
        self.num_requests[request.version] -= 1
        if not self.num_requests[request.version]:
            del self.num_requests[request.version]
            self.queues.pop(request.version, None)
        self.usage.remove(request.tenant, request.num_charged_tokens)
        if request.slo.tpot_s is not None:
            self._forget_tpot(request.slo.tpot_s)

    def will_hold(self, version: bytes) -> bool:
        """Whether the version is on the GPU, or on its way there for a request."""
        return version in self.gpu or version in self.num_requests

    def update_residency(
        self,
        *,
        snapshot: bool,
        gpu: tuple[Iterable[bytes], Iterable[bytes]],
        host: tuple[Iterable[bytes], Iterable[bytes]],
    ) -> None:
        """Apply versions that were added and removed; a snapshot replaces what was known."""
        for known, (added, removed) in ((self.gpu, gpu), (self.host, host)):
            if snapshot:
                known.clear()
            known.difference_update(removed)
            known.update(added)

    def check_integrity(self) -> None:
        """What is counted is what it works on."""
        active = self.active.values()
        assert self.num_requests == Counter(r.version for r in active)
        assert self.queues == {r.version: r.queue.of_version for r in active if r.version}
        assert self.usage.requests.by_tenant == Counter(r.tenant for r in active)
        assert self.usage.tokens.total == sum(r.num_charged_tokens for r in active)

    def _forget_tpot(self, tpot_s: float) -> None:
        self.num_tpots[tpot_s] -= 1
        if not self.num_tpots[tpot_s]:
            del self.num_tpots[tpot_s]
            self.tightest_tpot_s = min(self.num_tpots, default=math.inf)


def able(workers: Iterable[Worker], request: Request) -> list[Worker]:
    """Those of `workers` that could ever take the request; on the path of every pick."""
    rank, num_tokens = request.rank, request.num_context_tokens
    return [
        worker
        for worker in workers
        if rank <= worker.max_rank
        and num_tokens <= worker.max_context_tokens
        and worker.listed
        and not worker.draining
    ]
