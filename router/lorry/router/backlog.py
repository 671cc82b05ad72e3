"""The requests that are queued: who is next, and who has been passed over."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from lorry.router.fairness import Fairness, QueueKey
from lorry.router.line import Line, Turn
from lorry.router.order import Order
from lorry.router.request import Request

MAX_COMPARED = 8  # queues, for the first of some versions


class Backlog:
    """In the line of `order`, or of `overload_order` while `overloaded`.

    A request that is passed over leaves the line and is due at a given time at the latest.
    """

    def __init__(self, order: Order, overload_order: Order, fairness: Fairness) -> None:
        self.overloaded = False
        self._fairness = fairness
        self._normal = Line(order, fairness)
        same = type(order) is type(overload_order)
        self._overload = self._normal if same else Line(overload_order, fairness)
        self._lines = (self._normal,) if same else (self._normal, self._overload)
        self._queued: dict[QueueKey, dict[int, Request]] = {}  # by number
        self._queues_of: dict[bytes, set[QueueKey]] = {}  # by version
        self._due: OrderedDict[Request, float] = (
            OrderedDict()
        )  # who was passed over, and until when
        self._passed_over: dict[QueueKey, dict[Request, None]] = {}  # the same, by queue
        self._aside: set[Request] = set()
        self._held: set[str] = set()  # tenants
        self._num_requests = 0
        self._tokens: Counter[str] = Counter()  # of prompts, by tenant
        self._num_tokens = 0

    @property
    def order(self) -> Order:
        """The one in force."""
        return self._line.order

    def __len__(self) -> int:
        return self._num_requests

    def __contains__(self, request: Request) -> bool:
        return request.number in self._queued.get(request.queue, ())

    def __iter__(self) -> Iterator[Request]:
        for requests in self._queued.values():
            yield from requests.values()

    def add(self, request: Request) -> None:
        queue = request.queue
        if queue not in self._queued:
            self._queued[queue] = {}
            self._queues_of.setdefault(queue.version, set()).add(queue)
            self._fairness.enter(queue)
        self._queued[queue][request.number] = request
        self._count(request, 1)
        for line in self._lines:
            line.add(request)

    def remove(self, request: Request) -> None:
        """Does nothing if it is not queued."""
        queue = request.queue
        if request not in self:
            return
        del self._queued[queue][request.number]
        self._count(request, -1)
        self._aside.discard(request)
        self._forget_passing_over(request)
        for line in self._lines:
            line.discard(request)
        if not self._queued[queue]:
            del self._queued[queue]
            self._queues_of[queue.version].remove(queue)
            if not self._queues_of[queue.version]:
                del self._queues_of[queue.version]
            self._fairness.leave(queue)

    def first(self, now_s: float) -> Request | None:
        """Who is next: one that is overdue, else the first in line."""
        due = next((r for r in self._due if not self._is_skipped(r)), None)
        if due is not None and self._due[due] <= now_s:
            return due
        in_line = self._line.first()
        return due if in_line is None else in_line

    def is_overdue(self, request: Request, now_s: float) -> bool:
        return self._due.get(request, now_s + 1) <= now_s

    def ahead(self, now_s: float, limit: int) -> list[Request]:
        """Who is next, one after another; nobody is taken."""
        line, requests, turns = self._line, list[Request](), list[Turn]()
        while len(requests) < limit and (request := self.first(now_s)) is not None:
            requests.append(request)
            self._aside.add(request)
            if (turn := line.discard(request)) is not None:
                turns.append(turn)
            self.charge(request, prompt_tokens=request.num_known_tokens, output_tokens=0)
        for request in requests:
            self.charge(request, prompt_tokens=-request.num_known_tokens, output_tokens=0)
        self._aside.difference_update(requests)
        for turn in turns:
            line.put_back(turn)
        return requests

    def pass_over(self, request: Request, due_s: float) -> None:
        """Let others go first until `due_s`; calls come with ascending ones."""
        if request in self._due:
            return
        self._due[request] = due_s
        self._passed_over.setdefault(request.queue, {})[request] = None
        for line in self._lines:
            line.discard(request)

    def first_with(self, versions: Iterable[bytes]) -> Request | None:
        """Who is next of these versions' requests; those that were passed over go first."""
        waiting = filter(self._queues_of.__contains__, versions)
        queues = chain.from_iterable(map(self._queues_of.__getitem__, waiting))
        compared = [q for q in islice(queues, MAX_COMPARED) if q.tenant not in self._held]
        for queue in filter(self._passed_over.__contains__, compared):
            if waits := self._first_passed_over(queue):
                return waits
        return self._line.first_among(compared)

    def set_aside(self, request: Request) -> None:
        """Have it skipped until `put_back`."""
        self._aside.add(request)
        for line in self._lines:
            line.discard(request)

    def hold(self, tenant: str) -> None:
        """Have all of the tenant's requests skipped until `put_back`."""
        self._held.add(tenant)
        for line in self._lines:
            line.hold(tenant)

    def put_back(self) -> None:
        """Undo all `set_aside` and `hold`."""
        self._held.clear()
        for line in self._lines:
            line.release()
        for request in self._aside:
            if request not in self._due:
                for line in self._lines:
                    line.add(request)
        self._aside.clear()

    def charge(self, request: Request, *, prompt_tokens: int, output_tokens: int) -> None:
        """Count service that a request gets, queued or not."""
        self._fairness.charge(
            request.queue, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )

    def tokens_ahead(self, tenant: str) -> float:
        """Prompt tokens that are sent before a request that the tenant adds to them, at most."""
        share = self._fairness.share(tenant)
        own = self._tokens[tenant]
        return min(self._num_tokens, own / share) if share else self._num_tokens

    def check_integrity(self) -> None:
        queued = list(self)
        assert len(set(queued)) == len(queued) == self._num_requests
        assert all(self._queued.values()), "an empty queue was kept"
        passed_over = [r for requests in self._passed_over.values() for r in requests]
        assert len(passed_over) == len(self._due)
        assert set(passed_over) == set(self._due) <= set(queued)
        assert not self._aside
        assert not self._held
        assert self._num_tokens == sum(r.num_known_tokens for r in queued) == self._tokens.total()
        for request in queued:
            assert all((request in line) != (request in self._due) for line in self._lines)
        assert set().union(*self._queues_of.values()) == set(self._queued)

    def _count(self, request: Request, sign: int) -> None:
        tokens = sign * request.num_known_tokens
        self._num_requests += sign
        self._num_tokens += tokens
        self._tokens[request.tenant] += tokens
        if not self._tokens[request.tenant]:
            del self._tokens[request.tenant]

    def _first_passed_over(self, queue: QueueKey) -> Request | None:
        return next((r for r in self._passed_over[queue] if not self._is_skipped(r)), None)

    def _forget_passing_over(self, request: Request) -> None:
        if self._due.pop(request, None) is not None:
            del self._passed_over[request.queue][request]
            if not self._passed_over[request.queue]:
                del self._passed_over[request.queue]

    def _is_skipped(self, request: Request) -> bool:
        return request in self._aside or request.tenant in self._held

    @property
    def _line(self) -> Line:
        return self._overload if self.overloaded else self._normal
