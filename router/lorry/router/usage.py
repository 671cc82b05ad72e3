"""What a worker's requests take of its places and of its memory."""

from collections import Counter
from dataclasses import dataclass, field

PAGE_TOKENS = 16  # the protocol's


@dataclass(slots=True)
class Amounts:
    """Requests and tokens of context, by tenant and in all."""

    by_tenant: Counter[str] = field(default_factory=Counter)
    total: int = 0

    def add(self, tenant: str, amount: int) -> None:
        """What is negative takes away."""
        self.total += amount
        self.by_tenant[tenant] += amount
        if not self.by_tenant[tenant]:
            del self.by_tenant[tenant]


@dataclass(slots=True)
class Usage:
    """This router's own requests as they are, and what the worker told when it did last of all
    routers' requests."""

    requests: Amounts = field(default_factory=Amounts)
    tokens: Amounts = field(default_factory=Amounts)
    _other_requests: int = 0  # than this router's
    _other_tokens: int = 0  # and those of the adapters in use; negative where prefixes are shared

    def add(self, tenant: str, num_tokens: int) -> None:
        self.requests.add(tenant, 1)
        self.tokens.add(tenant, num_tokens)

    def grow(self, tenant: str, num_tokens: int) -> None:
        self.tokens.add(tenant, num_tokens)

    def remove(self, tenant: str, num_tokens: int) -> None:
        self.requests.add(tenant, -1)
        self.tokens.add(tenant, -num_tokens)

    def told(self, num_requests: int, num_pages: int, unstarted_tokens: int) -> None:
        """The worker has so many requests and pages in use; of this router's tokens, so many have
        none yet."""
        self._other_requests = max(0, num_requests - self.requests.total)
        own_tokens = self.tokens.total - unstarted_tokens
        self._other_tokens = num_pages * PAGE_TOKENS - own_tokens

    @property
    def places(self) -> int:
        return self.requests.total + self._other_requests

    @property
    def pages(self) -> float:
        return (self.tokens.total + self._other_tokens) / PAGE_TOKENS
