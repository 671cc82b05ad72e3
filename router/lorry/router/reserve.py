"""Room at a worker that is kept for whoever has less than its fair share."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from lorry.router.usage import Amounts
from lorry.router.worker import Worker

MEMORY_S = 60.0  # that a tenant counts after its last request has come


class Reserve(Protocol):
    max_lead_tokens: int  # of service, by which others may get ahead of a tenant whose turn it is

    def arrived(self, tenant: str, now_s: float) -> None: ...

    def is_tight(self, worker: Worker, room_tokens: float) -> bool:
        """Whether the worker, where prompts of `room_tokens` may wait, has only left what is
        kept."""
        ...

    def is_over(self, tenant: str, worker: Worker) -> bool:
        """Whether the tenant has more than its fair share of what is taken of the worker: of
        its pages if they are short, else of its places."""
        ...


class NoReserve:
    """Whose turn it is gets the last place."""

    max_lead_tokens = 0

    def arrived(self, tenant: str, now_s: float) -> None:
        pass

    def is_tight(self, worker: Worker, room_tokens: float) -> bool:
        return False

    def is_over(self, tenant: str, worker: Worker) -> bool:
        return False


class ShareReserve:
    """A part of each worker is kept from tenants with more than their fair share of it.

    Turns alone do not keep the first tokens of others from waiting: whose turn it is waits for a
    place until one of many requests ends, and behind the prompts that are at the worker. So such a
    tenant fills a worker's places and pages up to `1 - kept` only, and sends no more once prompts
    wait there that fill `step_share` of what a step has left, or of their room there. What is kept
    serves nobody while those that it is for do not come: nothing is, from a tenant that was alone
    for a while. Fair shares are by weight, among the tenants that were seen lately.
    """

    def __init__(
        self,
        *,
        kept: float,
        step_share: float,
        max_lead_tokens: int,
        weight: Callable[[str], float],
    ) -> None:
        self.max_lead_tokens = max_lead_tokens
        self._filled = 1.0 - kept
        self._step_share = step_share
        self._weight = weight
        self._seen_s: OrderedDict[str, float] = OrderedDict()  # by tenant, longest ago first
        self._seen_weight = 0.0

    def arrived(self, tenant: str, now_s: float) -> None:
        if tenant not in self._seen_s:
            self._seen_weight += self._weight(tenant)
        self._seen_s[tenant] = now_s
        self._seen_s.move_to_end(tenant)
        while self._seen_s[oldest := next(iter(self._seen_s))] < now_s - MEMORY_S:
            del self._seen_s[oldest]
            self._seen_weight -= self._weight(oldest)

    def is_tight(self, worker: Worker, room_tokens: float) -> bool:
        if len(self._seen_s) < 2:
            return False
        if worker.step_tokens:
            room_tokens = min(room_tokens, worker.step_tokens - worker.usage.places)
        is_queued = 0 < worker.unstarted_tokens >= self._step_share * room_tokens
        return is_queued or self._scarce(worker) is not None

    def is_over(self, tenant: str, worker: Worker) -> bool:
        requests = worker.usage.requests
        if requests.by_tenant[tenant] <= 1:
            return False
        amounts = self._scarce(worker) or requests
        return amounts.by_tenant[tenant] > self._share(tenant) * amounts.total

    def _scarce(self, worker: Worker) -> Amounts | None:
        """What is all taken but for what is kept; of what the worker has not told, there is
        enough."""
        usage, max_pages = worker.usage, worker.status.pages_total
        if worker.max_running and usage.places >= self._filled * worker.max_running:
            return usage.requests
        if max_pages and usage.pages >= self._filled * max_pages:
            return usage.tokens
        return None

    def _share(self, tenant: str) -> float:
        own, is_seen = self._weight(tenant), tenant in self._seen_s
        if len(self._seen_s) == is_seen:
            return 1.0
        return own / (self._seen_weight + (0.0 if is_seen else own))
