"""Which of the requests whose turn it is goes first."""

from typing import Protocol

from lorry.router.request import Request

# What a request without an objective is taken to want, so that no stream of those with one starves
# it: its turn comes when its arrival is this long ago.
RELAXED_TTFT_S = 30.0


class Order(Protocol):
    def key(self, request: Request) -> float:
        """The least goes first; does not change while the request waits. Among equals, arrival."""
        ...


class ArrivalOrder:
    """First come, first served."""

    def key(self, request: Request) -> float:
        return request.number


class NewestOrder:
    """Last come, first served.

    Where not all can be served in time and an early first token is worth more, serving the latest
    arrivals is best (S-LoRA, arXiv 2311.03285, theorem B.1).
    """

    def key(self, request: Request) -> float:
        return -request.number


class DeadlineOrder:
    """The one whose time to first token runs out first."""

    def key(self, request: Request) -> float:
        ttft_s = request.slo.ttft_s
        return request.arrival_s + (RELAXED_TTFT_S if ttft_s is None else ttft_s)
