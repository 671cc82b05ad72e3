"""Which of the requests whose turn it is goes first."""

from typing import Protocol

from lorry.router.request import Request

# What a request without an objective is taken to want, so that no stream of those with one starves
# it: its turn comes when its arrival is this long ago.
RELAXED_TTFT_S = 30.0
SMOOTHING = 0.02  # weight of the newest request in the average size
OUTPUT_PRICE = 2  # of an output token, in prompt tokens


class Order(Protocol):
    waits_for_older: bool  # whether an arrival lets those go first that are there

    def key(self, request: Request) -> float:
        """For a request that joins the line; the least goes first, and among equals the oldest."""
        ...


class ArrivalOrder:
    """First come, first served."""

    waits_for_older = True

    def key(self, request: Request) -> float:
        return request.number


class NewestOrder:
    """Last come, first served.

    Where not all can be served in time and an early first token is worth more, serving the latest
    arrivals is best (S-LoRA, arXiv 2311.03285, theorem B.1).
    """

    waits_for_older = False

    def key(self, request: Request) -> float:
        return -request.number


class DeadlineOrder:
    """The one whose time to first token runs out first."""

    waits_for_older = True

    def key(self, request: Request) -> float:
        return request.arrival_s + _ttft_s(request)


class SparingOrder:
    """The latest arrivals, but small requests before large ones of about the same time.

    Where not all can be served in time, each that is served costs others their turn: so many more
    are served if those are that ask for little: one of average size goes behind one of size 0 by
    all of its time to first token. Size is the prompt and the output that is asked for; one that
    does not say how much counts as average.
    """

    waits_for_older = False

    def __init__(self) -> None:
        self._mean_size = 0.0

    def key(self, request: Request) -> float:
        size = self._size(request)
        self._mean_size += SMOOTHING * (size - self._mean_size) if self._mean_size else size
        behind = size / self._mean_size if self._mean_size else 0.0
        return behind * _ttft_s(request) - request.arrival_s

    def _size(self, request: Request) -> float:
        asked = request.generation.max_tokens
        if asked is None:
            return self._mean_size
        return len(request.prompt_ids) + OUTPUT_PRICE * asked


def _ttft_s(request: Request) -> float:
    ttft_s = request.slo.ttft_s
    return RELAXED_TTFT_S if ttft_s is None else ttft_s
