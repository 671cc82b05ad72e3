"""What the router knows of one attached worker."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lorry.router.request import Request


@dataclass(slots=True, eq=False)
class Worker:
    """One stream to a worker, from its Welcome on. A new stream is a new `Worker`."""

    name: str  # its address
    epoch: int
    max_context_tokens: int
    max_rank: int
    submit_limit: int  # Submits that the stream may have sent in all
    draining: bool = False
    num_submitted: int = 0
    active: dict[int, Request] = field(default_factory=dict)  # by seq
    gpu: set[bytes] = field(default_factory=set)  # versions usable by the next step
    host: set[bytes] = field(default_factory=set)  # versions in host memory
    prefetched: tuple[bytes, ...] = ()  # versions of the last Prefetch

    @property
    def has_room(self) -> bool:
        return not self.draining and self.num_submitted < self.submit_limit

    @property
    def load(self) -> int:
        """Requests of this router that it works on."""
        return len(self.active)

    def can_serve(self, request: Request) -> bool:
        """Whether it could ever take the request."""
        return (
            not self.draining
            and request.rank <= self.max_rank
            and request.num_context_tokens <= self.max_context_tokens
        )

    def raise_submit_limit(self, limit: int) -> None:
        """A smaller limit changes nothing."""
        self.submit_limit = max(self.submit_limit, limit)

    def add(self, request: Request) -> int:
        """Number the request on this stream."""
        assert self.has_room, f"worker {self.name} takes no Submit beyond {self.submit_limit}"
        self.num_submitted += 1
        self.active[self.num_submitted] = request
        return self.num_submitted

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
