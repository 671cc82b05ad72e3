"""What the dispatcher has the router do."""

from typing import NamedTuple

from lorry.router.request import Request
from lorry.router.worker import Worker


class Submit(NamedTuple):
    worker: Worker
    seq: int
    request: Request


class Abort(NamedTuple):
    """The request cannot keep its objective; it is still queued and to be ended."""

    request: Request
    ttft_s: float  # that it would have, as predicted
    tpot_s: float | None = None  # the same, if that is why


class Prefetch(NamedTuple):
    """The whole set of versions that the worker is to have at hand, most urgent first."""

    worker: Worker
    versions: tuple[bytes, ...]


Action = Submit | Abort | Prefetch
