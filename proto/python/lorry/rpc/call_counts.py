"""How many calls a server takes, and how they end."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc

from lorry.rpc.errors import ERRORS, LorryError
from lorry.rpc.metrics import Metric, counter, gauge


class Outcome(NamedTuple):
    """Labels of an end, out of the table of errors: a peer's own words never become labels."""

    code: str
    reason: str  # empty for ends that have none

    @classmethod
    def of(cls, error: Exception) -> "Outcome":
        if not isinstance(error, LorryError):
            error = LorryError("")
        known = (error.code, error.reason) in ERRORS
        return cls(error.code.name, error.reason if known else "")


OK = Outcome(grpc.StatusCode.OK.name, "")
CANCELLED = Outcome(grpc.StatusCode.CANCELLED.name, "")


class Call:
    """One call; whoever knows how it ends says so before it is over, else its client left."""

    __slots__ = ("_counts", "_method", "outcome")

    def __init__(self, counts: "CallCounts", method: str) -> None:
        self._counts = counts
        self._method = method
        self.outcome = CANCELLED
        counts.in_progress[method,] += 1

    def end(self, _: Any) -> None:
        """To be called once, when gRPC is done with it, which also hears of a lost client."""
        self._counts.in_progress[self._method,] -= 1
        self._counts.ended[self._method, *self.outcome] += 1


class CallCounts:
    """By method, such as ``/lorry.v1.InferenceService/Generate``, of those that the server has."""

    def __init__(self) -> None:
        self.in_progress: Counter[tuple[str]] = Counter()
        self.ended: Counter[tuple[str, str, str]] = Counter()  # by method, code and reason


def call_metrics(prefix: str) -> Sequence[Metric[CallCounts]]:
    return (
        counter(
            f"{prefix}_calls_total",
            "gRPC calls that have ended, by method, status code and reason",
            lambda calls: calls.ended,
            ("method", "code", "reason"),
        ),
        gauge(
            f"{prefix}_calls_in_progress",
            "gRPC calls under way, by method",
            lambda calls: calls.in_progress,
            ("method",),
        ),
    )
