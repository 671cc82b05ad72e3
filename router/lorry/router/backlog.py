"""The requests that are queued: who is next, and who has been passed over."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from weakref import WeakValueDictionary

from lorry.router.fairness import Fairness
from lorry.router.line import Line
from lorry.router.order import Order
from lorry.router.queue import Queue, Queues, Turn
from lorry.router.request import Request

MAX_COMPARED = 8  # queues, for the first of some versions


class Backlog:
    """In the line of `order`, or of `overload_order` while `overloaded`.

    A request that is passed over leaves the line and is due at a given time at the latest.
    """

    def __init__(self, order: Order, overload_order: Order, fairness: Fairness) -> None:
        self.overloaded = False
        self._fairness = fairness
        self._normal = Line(order, fairness, 0)
        same = type(order) is type(overload_order)
        self._overload = self._normal if same else Line(overload_order, fairness, 1)
        self._lines = (self._normal,) if same else (self._normal, self._overload)
        self._num_turns = 0  # ever given
        # By version; its requests keep them, whether they wait or are at a worker.
        self._queues = WeakValueDictionary[bytes, Queues]()
        # Who was passed over, and until when.
        self._due: OrderedDict[Request, float] = OrderedDict()
        self._aside: dict[Request, None] = {}  # not a set, which has no order of its own
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
        return request.number in request.queue.requests

    def __iter__(self) -> Iterator[Request]:
        for queues in self._queues.values():
            for queue in queues.values():
                yield from queue.requests.values()

    def add(self, request: Request) -> None:
        queues = self._queues.get(request.version)
        if queues is None:
            queues = self._queues[request.version] = Queues()
        queue = queues.get(request.tenant)
        if queue is None:
            heaps = tuple[list[Turn], ...]([] for _ in self._lines)
            queue = Queue(request.tenant, request.version, heaps=heaps, of_version=queues)
            queues[request.tenant] = queue
            self._fairness.enter(queue)
        request.queue = queue
        queue.requests[request.number] = request
        self._count(request, 1)
        self._join_lines(request)

    def remove(self, request: Request) -> None:
        """Does nothing if it is not queued."""
        queue = request.queue
        if queue.requests.pop(request.number, None) is None:
            return
        self._count(request, -1)
        self._aside.pop(request, None)
        if self._due.pop(request, None) is not None:
            del queue.passed_over[request]
        request.turn = 0
        if not queue.requests:
            del queue.of_version[queue.tenant]
            for heap in queue.heaps:
                heap.clear()  # a line may know the queue until it comes to the front
            self._fairness.leave(queue)

    def first(self, now_s: float) -> Request | None:
        """Who is next: one that is overdue, else the first in line."""
        due = self._first_due()
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
            self._aside[request] = None
            if request.turn:
                turns.append(line.take(request.queue))
                request.turn = 0
            self.charge(request, prompt_tokens=request.num_known_tokens, output_tokens=0)
        for request in requests:
            self.charge(request, prompt_tokens=-request.num_known_tokens, output_tokens=0)
        for request in requests:
            del self._aside[request]
        for turn in turns:
            _, _, joined, request = turn
            request.turn = joined
            line.put_back(turn)
        return requests

    def pass_over(self, request: Request, due_s: float) -> None:
        """Let others go first until `due_s`; calls come with ascending ones."""
        if request in self._due:
            return
        self._due[request] = due_s
        request.queue.passed_over[request] = None
        request.turn = 0

    def first_with(self, versions: Iterable[Queues]) -> Request | None:
        """Who is next of these versions' requests; those that were passed over go first."""
        waiting = map(dict[str, Queue].values, filter(None, versions))
        compared = list(islice(chain.from_iterable(waiting), MAX_COMPARED))
        if self._held:
            compared = [queue for queue in compared if queue.tenant not in self._held]
        for queue in compared:
            for request in queue.passed_over:
                if not self._is_skipped(request):
                    return request
        return self._line.first_among(compared)

    def set_aside(self, request: Request) -> None:
        """Have it skipped until `put_back`."""
        self._aside[request] = None
        request.turn = 0

    def hold(self, tenant: str) -> None:
        """Have all of the tenant's requests skipped until `put_back`."""
        self._held.add(tenant)
        for line in self._lines:
            line.hold(tenant)

    def put_back(self) -> None:
        """Undo all `set_aside` and `hold`."""
        if not self._aside and not self._held:
            return
        self._held.clear()
        for line in self._lines:
            line.release()
        for request in self._aside:
            if request not in self._due:
                self._join_lines(request)
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
        queues = [queue for queues in self._queues.values() for queue in queues.values()]
        assert len(set(queued)) == len(queued) == self._num_requests
        assert all(queue.requests for queue in queues), "an empty queue was kept"
        assert all(queue.of_version is self._queues[queue.version] for queue in queues)
        assert all(request.queue in queues for request in queued)
        passed_over = [request for queue in queues for request in queue.passed_over]
        assert len(passed_over) == len(self._due)
        assert set(passed_over) == set(self._due) <= set(queued)
        assert not self._aside
        assert not self._held
        assert self._num_tokens == sum(r.num_known_tokens for r in queued) == self._tokens.total()
        for queue in queues:
            in_line = set(queue.requests.values()) - queue.passed_over.keys()
            for line in self._lines:
                assert Counter(line.waiting(queue)) == Counter(in_line)

    def _join_lines(self, request: Request) -> None:
        self._num_turns += 1
        request.turn = self._num_turns
        for line in self._lines:
            line.add(request)

    def _count(self, request: Request, sign: int) -> None:
        tokens = sign * request.num_known_tokens
        self._num_requests += sign
        self._num_tokens += tokens
        self._tokens[request.tenant] += tokens
        if not self._tokens[request.tenant]:
            del self._tokens[request.tenant]

    def _first_due(self) -> Request | None:
        for request in self._due:
            if not self._is_skipped(request):
                return request
        return None

    def _is_skipped(self, request: Request) -> bool:
        return request in self._aside or request.tenant in self._held

    @property
    def _line(self) -> Line:
        return self._overload if self.overloaded else self._normal
