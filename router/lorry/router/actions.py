"""What the dispatcher has the router do."""

from dataclasses import dataclass

from lorry.router.request import Request
from lorry.router.worker import Worker


@dataclass(frozen=True, slots=True)
class Submit:
    worker: Worker
    seq: int
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """The request cannot keep its objective; it is still queued and to be ended."""

    request: Request
    ttft_s: float  # that it would have, as predicted
    tpot_s: float | None = None  # the same, if that is why


@dataclass(frozen=True, slots=True)
class Prefetch:
    """The whole set of versions that the worker is to have at hand, most urgent first."""

    worker: Worker
    versions: tuple[bytes, ...]


Action = Submit | Abort | Prefetch
