"""The requests of one tenant for one version that are queued."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorry.router.request import Request

# A request's key in the order of a line, its number, its `turn` when it joined, and itself; if its
# `turn` is another one by now, it has left the line.
Turn = tuple[float, int, int, "Request"]


@dataclass(slots=True, eq=False)
class Queue:
    """Looked up once for each request that joins, so that a pick need not do so again."""

    tenant: str
    version: bytes  # empty: the base model
    requests: "dict[int, Request]" = field(default_factory=dict)  # by number
    passed_over: "dict[Request, None]" = field(default_factory=dict)  # some of them
    heaps: tuple[list[Turn], ...] = ()  # of the others, for each line; some have left
    of_version: "Queues" = field(default_factory=lambda: Queues())  # those that are not empty


class Queues(dict[str, Queue]):
    """The queues of one version that are not empty, by tenant.

    All requests of a version that wait or are at workers have the same one, so that a worker sees
    which of its versions are waited for without looking them up.
    """

    __slots__ = ("__weakref__",)


NOWHERE = Queue("", b"")  # is a request before it is queued
