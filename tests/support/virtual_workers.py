"""Workers that compute nothing, on a clock of their own, behind a real dispatcher.

A step takes a fixed time and so much for each of its rows: one for each decoding request, and
prompt tokens of those that have begun or waited longest, up to the step's budget.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from lorry.router.actions import Abort, Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.request import Request, RequestState
from lorry.router.worker import Worker, WorkerStatus
from lorry.rpc.errors import LorryError
from tests.support.router_requests import worker

S = RequestState


@dataclass(eq=False)
class VirtualWorker:
    known: Worker
    step_s: float = 0.01  # whatever the rows
    row_s: float = 0.0001
    step_tokens: int = 256
    max_running: int = 64
    prompts: dict[Request, int] = field(default_factory=dict)  # tokens left to compute
    decoding: list[Request] = field(default_factory=list)
    is_stepping: bool = False

    @property
    def status(self) -> WorkerStatus:
        """As if measured a moment ago."""
        return WorkerStatus(
            running=len(self.decoding),
            waiting=len(self.prompts),
            queued_prompt_tokens=sum(self.prompts.values()),
            prefill_tokens_per_s=1 / self.row_s,
            step_s=[(1, self.step_s + self.row_s), (64, self.step_s + 64 * self.row_s)],
            adapter_load_bytes_per_s=1e9,
        )


@dataclass(eq=False)
class Ended:
    """How each request ended."""

    finished: list[Request] = field(default_factory=list)
    aborted: dict[Request, tuple[float, float]] = field(default_factory=dict)  # when, predicted

    def ttft_s(self, request: Request) -> float:
        assert request.first_token_s is not None
        return request.first_token_s - request.arrival_s


class VirtualFleet:
    """Runs `dispatcher` and its workers; what happens is in `ended` and `submits`."""

    def __init__(self, dispatcher: Dispatcher, num_workers: int = 1, **fields: Any) -> None:
        self.dispatcher = dispatcher
        self.now_s = 0.0
        self.ended = Ended()
        self.submits: list[Submit] = []
        self.workers = {
            name: VirtualWorker(
                worker(name, submit_limit=1 << 30, max_context_tokens=4096), **fields
            )
            for name in (f"w{number}" for number in range(num_workers))
        }
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        for virtual in self.workers.values():
            dispatcher.attach(virtual.known)
            self._tell(virtual)

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), event))

    def arrive(self, request: Request) -> None:
        """Have it arrive at its time."""
        self.at(request.arrival_s, lambda: self._arrive(request))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        self.now_s = until_s

    def _arrive(self, request: Request) -> None:
        try:
            self.dispatcher.receive(request)
            self.dispatcher.enqueue(request, self.now_s)
        except LorryError as error:
            self.dispatcher.end(request, S.FAILED)
            self.ended.aborted[request] = (self.now_s, float(error.metadata["predictedTtftS"]))
        self._plan()

    def _plan(self) -> None:
        for action in self.dispatcher.plan(self.now_s):
            if isinstance(action, Submit):
                self.submits.append(action)
                virtual = self.workers[action.worker.name]
                virtual.prompts[action.request] = action.request.num_known_tokens
                self._step(virtual)
            elif isinstance(action, Abort):
                self.ended.aborted[action.request] = (self.now_s, action.ttft_s)
                self.dispatcher.end(action.request, S.FAILED)
        next_s = self.dispatcher.next_plan_s
        if next_s is not None:
            self.at(max(next_s, self.now_s), self._plan_if_due)

    def _plan_if_due(self) -> None:
        next_s = self.dispatcher.next_plan_s
        if next_s is not None and next_s <= self.now_s:
            self._plan()

    def _tell(self, virtual: VirtualWorker) -> None:
        self.dispatcher.hear(virtual.known, virtual.status, self.now_s)
        self.at(self.now_s + 1.0, lambda: self._tell(virtual))

    def _step(self, virtual: VirtualWorker) -> None:
        if virtual.is_stepping or not (virtual.prompts or virtual.decoding):
            return
        virtual.is_stepping = True
        rows, begun = len(virtual.decoding), list[Request]()
        for request, left in list(virtual.prompts.items()):
            taken = min(left, virtual.step_tokens - rows)
            if taken <= 0 or len(virtual.decoding) + len(begun) >= virtual.max_running:
                break
            rows += taken
            virtual.prompts[request] = left - taken
            if taken == left:
                begun.append(request)
        seconds = virtual.step_s + rows * virtual.row_s
        self.at(self.now_s + seconds, lambda: self._end_step(virtual, begun))

    def _end_step(self, virtual: VirtualWorker, begun: list[Request]) -> None:
        virtual.is_stepping = False
        for request in begun:
            del virtual.prompts[request]
            request.first_token_s = self.now_s
        virtual.decoding += begun
        for request in list(virtual.decoding):
            request.output_ids.append(1)
            self.dispatcher.drew(request, self.now_s)
            if len(request.output_ids) == request.max_tokens:
                virtual.decoding.remove(request)
                self.dispatcher.end(request, S.FINISHED)
                self.ended.finished.append(request)
        self._plan()
        self._step(virtual)
