"""Whose turn it is: a tenant's, and within the tenant an adapter's.

Virtual token counters (VTC, arXiv 2401.00588): each flow has a counter of the service that it got,
and the least served one is next. Service is counted in tokens, those of the output twice, divided
by the flow's weight. A flow that comes back after a while is lifted to the others, so that nobody
saves up for a burst.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from lorry.router.keyed_heap import KeyedHeap
from lorry.router.queue import Queue

K = TypeVar("K")

OUTPUT_PRICE = 2  # of an output token, in prompt tokens; the paper's
SPARE_COUNTERS = 1024  # that nobody waits with and are kept, beside as many as are waited with


class Fairness(Protocol):
    """Ranks: the least goes first, and among equals the order of their requests decides."""

    def tenant_rank(self, tenant: str) -> float: ...
    def queue_rank(self, queue: Queue) -> float: ...

    def share(self, tenant: str) -> float:
        """Of the service, that the tenant gets at least while it waits; 0: none is assured."""
        ...

    def enter(self, queue: Queue) -> None:
        """It has requests that wait, and had none."""
        ...

    def leave(self, queue: Queue) -> None:
        """It has no more requests that wait."""
        ...

    def charge(self, queue: Queue, *, prompt_tokens: int, output_tokens: int) -> None:
        """Count service that a request of the queue gets; what is negative takes it back."""
        ...


class NoFairness:
    """Whoever is first in order."""

    def tenant_rank(self, tenant: str) -> float:
        return 0

    def queue_rank(self, queue: Queue) -> float:
        return 0

    def share(self, tenant: str) -> float:
        return 0.0

    def enter(self, queue: Queue) -> None:
        pass

    def leave(self, queue: Queue) -> None:
        pass

    def charge(self, queue: Queue, *, prompt_tokens: int, output_tokens: int) -> None:
        pass


class Counters(Generic[K]):
    """Virtual token counters of the flows of one level."""

    def __init__(self, weight: Callable[[K], float]) -> None:
        self._weight = weight
        self.values: dict[K, float] = {}  # 0 of who is not there
        self._waiting: set[K] = set()
        self._waiting_weight = 0.0
        self._by_value = KeyedHeap[K, tuple[float, K]](self._value_if_waiting)
        self._last: K | None = None  # that stopped waiting

    def share(self, flow: K) -> float:
        """Of all weights, beside those that wait."""
        weight = self._weight(flow)
        others = self._waiting_weight - (weight if flow in self._waiting else 0.0)
        return weight / (weight + max(0.0, others))

    def enter(self, flow: K) -> None:
        self.values[flow] = max(self.values.get(flow, 0.0), self._least())
        self._waiting.add(flow)
        self._waiting_weight += self._weight(flow)
        self._by_value.touch(flow)

    def leave(self, flow: K) -> None:
        self._waiting.remove(flow)
        self._waiting_weight -= self._weight(flow)
        self._last = flow
        if len(self.values) > 2 * len(self._waiting) + SPARE_COUNTERS:
            self._forget()

    def charge(self, flow: K, tokens: float) -> None:
        before = self.values.get(flow)
        if before is None:
            before = self._least()
        self.values[flow] = before + tokens / self._weight(flow)
        if tokens < 0:
            self._by_value.touch(flow)

    def _value_if_waiting(self, flow: K) -> tuple[float, K] | None:
        return (self.values[flow], flow) if flow in self._waiting else None

    def _least(self) -> float:
        """What a flow that comes back is lifted to."""
        least = self._by_value.least()
        if least is not None:
            return least[0]
        return 0.0 if self._last is None else self.values[self._last]

    def _forget(self) -> None:
        """Drop the counters that the lift would overrule anyway."""
        least = self._least()
        self.values = {
            flow: value
            for flow, value in self.values.items()
            if value > least or flow in self._waiting or flow == self._last
        }


class TokenCounters:
    """VTC over tenants and, with `by_adapter`, over each tenant's adapters.

    Adapters whose counters are within the same `quantum_tokens` rank equal, so that order decides
    among them; the bound on the difference of their service grows by as much.
    """

    def __init__(
        self, *, weight: Callable[[str], float], by_adapter: bool, quantum_tokens: int
    ) -> None:
        self._tenants = Counters[str](weight)
        self._adapters: dict[str, Counters[bytes]] = {}
        self._num_queues: dict[str, int] = {}  # that wait, by tenant
        self._by_adapter = by_adapter
        self._quantum = quantum_tokens

    def tenant_rank(self, tenant: str) -> float:
        return self._tenants.values.get(tenant, 0.0)

    def queue_rank(self, queue: Queue) -> float:
        if not self._by_adapter:
            return 0
        return self._adapters[queue.tenant].values.get(queue.version, 0.0) // self._quantum

    def share(self, tenant: str) -> float:
        return self._tenants.share(tenant)

    def enter(self, queue: Queue) -> None:
        tenant = queue.tenant
        waiting = self._num_queues.get(tenant, 0)
        self._num_queues[tenant] = waiting + 1
        if not waiting:
            self._tenants.enter(tenant)
        if tenant not in self._adapters:
            self._adapters[tenant] = Counters[bytes](lambda version: 1.0)
        self._adapters[tenant].enter(queue.version)

    def leave(self, queue: Queue) -> None:
        tenant = queue.tenant
        self._num_queues[tenant] -= 1
        if not self._num_queues[tenant]:
            del self._num_queues[tenant]
            self._tenants.leave(tenant)
        self._adapters[tenant].leave(queue.version)

    def charge(self, queue: Queue, *, prompt_tokens: int, output_tokens: int) -> None:
        tokens = prompt_tokens + OUTPUT_PRICE * output_tokens
        self._tenants.charge(queue.tenant, tokens)
        if queue.tenant in self._adapters:
            self._adapters[queue.tenant].charge(queue.version, tokens)
