"""Iteration-level scheduling with chunked prompts, as pure bookkeeping: no clock, torch or I/O.

Each step is planned in stages: expire, decode, continue prompts, admit, prefetch. Only growth of a
running sequence preempts: the newest goes and is recomputed. Admission takes requests in arrival
order and skips one that does not fit, until it has been passed over too often: then it is waited
for. The scheduler does not know when a request will end.
"""

from collections.abc import Iterable
from itertools import chain, islice

import numpy as np

from lorry.worker.adapter_loader import AdapterLoader
from lorry.worker.deadlines import Deadlines
from lorry.worker.drawn import Drawn
from lorry.worker.feasibility import refusal
from lorry.worker.integrity import check_integrity
from lorry.worker.messages import (
    Failure,
    Finished,
    FinishReason,
    ImageReady,
    StepTokens,
    Submit,
)
from lorry.worker.page_sharing import PageSharing
from lorry.worker.plan import Batch, BatchBuilder, Plan
from lorry.worker.pool import PagePool
from lorry.worker.prefetches import Prefetches
from lorry.worker.prefix_cache import PrefixCache
from lorry.worker.request import Request, RequestState
from lorry.worker.residency import Adapter, AdapterState, Residency
from lorry.worker.room import Room
from lorry.worker.running import RunningRequests
from lorry.worker.scheduler_limits import SchedulerLimits
from lorry.worker.sequences import SequenceTable
from lorry.worker.waiting import WaitingRequests


class Scheduler:
    """Requests, sequences, pages and adapters of one engine, and what to do next with them."""

    def __init__(self, limits: SchedulerLimits, pool: PagePool, table: SequenceTable) -> None:
        self.limits = limits
        self.pool = pool
        self.table = table
        self.residency = Residency(pool)
        self.prefixes = PrefixCache(pool, table.page_tokens)
        self.requests: dict[int, Request] = {}
        self.steps = 0
        self.preemptions = 0
        self._waiting = WaitingRequests(self.residency)
        self._deadlines = Deadlines(self.requests)
        self._prefetches = Prefetches()
        self._sharing = PageSharing(table, self.prefixes, is_on=limits.prefix_cache)
        self._running = RunningRequests(table, pool, self.residency, self._sharing)

    @property
    def num_running(self) -> int:
        return len(self.requests) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, submit: Submit, now_s: float) -> Finished | None:
        """Take a request; returns its end at once if it can never be served here."""
        request = Request.of(submit, now_s)
        if failure := self._refusal(request):
            request.move_to(RequestState.FINISHED)
            return request.finished(FinishReason.ABORTED, failure)
        self.requests[request.number] = request
        self._waiting.add(request)
        self._deadlines.add(request)
        return None

    def cancel(self, numbers: list[int]) -> list[Finished]:
        """End requests; unknown and finished numbers are ignored."""
        found = [self.requests[n] for n in dict.fromkeys(numbers) if n in self.requests]
        return [self._end(request, FinishReason.CANCELLED) for request in found]

    def finish_fetch(self, adapter: Adapter, image: ImageReady) -> None:
        """The image of `adapter` is mapped."""
        self.residency.finish_fetch(adapter, image)
        self._waiting.unpark(adapter.version)

    def fail_adapter(self, adapter: Adapter, failure: Failure, now_s: float) -> list[Finished]:
        """The image of `adapter` cannot be had: end the requests that wait for it."""
        self.residency.fail_fetch(adapter)
        self._prefetches.fail(adapter.version, now_s)
        waiting = self._waiting.of(adapter.version)
        return [self._end(request, FinishReason.ABORTED, failure) for request in waiting]

    def set_prefetch(self, versions: list[bytes]) -> None:
        """Replace the versions that will be wanted next, most urgent first."""
        self._prefetches.replace(versions)

    def plan(self, now_s: float, pins: list[bytes]) -> Plan:
        """Decide the next step; `pins` are versions that operators wait for."""
        plan = Plan()
        self.residency.begin_step(self.steps)
        room = Room(self.pool, self.residency, self.prefixes, plan, self.steps)
        loader = AdapterLoader(self.residency, room, plan, max_fetches=self.limits.max_fetches)
        self._expire(plan, now_s)
        for version in pins:
            loader.want(version, watermark=self.num_running)
        rows = BatchBuilder(self.table, self.limits.step_tokens)
        self._decode(plan, rows, room)
        self._running.continue_prompts(rows)
        self._admit(plan, rows, loader, room, now_s)
        self._load_ahead(loader, now_s)
        plan.batch = rows.build(self.steps + 1)
        self.steps += plan.batch is not None
        return plan

    def commit(self, batch: Batch, drawn: Drawn, now_s: float) -> tuple[StepTokens, list[Finished]]:
        """Take what a step drew for its sampling sequences."""
        table = self.table
        alive_S = table.admission_R[batch.row_S] == batch.admission_S
        read_S = batch.samples_S & alive_S
        rows, (token_ids, logprobs) = batch.row_S[read_S], drawn.only(alive_S[batch.samples_S])
        position = table.num_prompt_R[rows] + batch.output_position_S[read_S]
        table.token_ids_RC[rows, position] = token_ids
        table.num_read_R[rows] = position + 1
        tokens = StepTokens(
            batch.step,
            table.number_R[rows].tolist(),
            token_ids.tolist(),
            logprobs.to_message() if logprobs is not None else None,
        )
        self._running.note_first_tokens(rows, now_s)
        self._sharing.note_done(batch, alive_S)
        stopped = table.is_stop(rows, token_ids)
        ended = stopped | (table.num_read_R[rows] >= table.most_tokens_R[rows])
        finished = [
            self._end(self._running.at(row), FinishReason.STOP if is_stop else FinishReason.LENGTH)
            for row, is_stop in zip(rows[ended].tolist(), stopped[ended].tolist(), strict=True)
        ]
        return tokens, finished

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, slots and references agree with their owners."""
        running = [r for r in self.requests.values() if r.state is not RequestState.WAITING]
        check_integrity(running, self.table, self.pool, self.prefixes, self.residency)
        assert len(running) == self.num_running
        self._waiting.check_integrity()

    def _refusal(self, request: Request) -> Failure | None:
        context = self.limits.max_context_tokens
        return refusal(request, context, self.pool, self.residency, self.table.page_tokens)

    def _expire(self, plan: Plan, now_s: float) -> None:
        for request in self._deadlines.expired(now_s):
            failure = Failure("DEADLINE_EXPIRED", "the deadline passed")
            plan.finished.append(self._end(request, FinishReason.ABORTED, failure))

    def _decode(self, plan: Plan, rows: BatchBuilder, room: Room) -> None:
        """One row for each sequence that can still draw a token."""
        table = self.table
        decoding = self._running.decoding_rows()
        full = table.num_computed_R[decoding] >= table.num_pages_R[decoding] * table.page_tokens
        growing = decoding[full]
        growing = growing[np.argsort(table.number_R[growing])]
        if room.make(len(growing)):
            table.append_page_each(growing, self.pool.allocate_kv(len(growing)))
            rows.add_decodes(decoding)
            return
        stalled = [row for row in growing.tolist() if not self._grow_in_turn(row, plan, room)]
        ready = self._running.decoding_rows()
        rows.add_decodes(ready[~np.isin(ready, stalled)])

    def _grow_in_turn(self, row: int, plan: Plan, room: Room) -> bool:
        """`_grow` of a row that an older one may have preempted."""
        return not self.table.is_decoding_R[row] or self._grow(row, plan, room)

    def _grow(self, row: int, plan: Plan, room: Room) -> bool:
        """Give the row a page, if need be a newer sequence's; False if it must wait for one."""
        while not room.make(1):
            newest = self._running.newest()
            own = newest.row == row
            if own and any(a.state is AdapterState.LOADING for a in self.residency):
                return False  # its pages can be had as soon as the copy is done
            self._preempt(newest, plan)
            if own:
                return False
        self.table.append_pages(row, self.pool.allocate_kv(1))
        return True

    def _admit(
        self, plan: Plan, rows: BatchBuilder, loader: AdapterLoader, room: Room, now_s: float
    ) -> None:
        """Start waiting requests that fit, oldest first."""
        waiting, considered = self._waiting.in_order(loader), 0
        passed_over: list[Request] = []
        for request in waiting:
            if not rows.left or self.num_running >= self.limits.max_running:
                self._bring_nearer(islice(chain([request], waiting), self.limits.max_ahead), loader)
                return
            if loader.must_wait_for(request.version):
                self._waiting.park(request)
                continue
            if considered == self.limits.max_considered:
                return
            considered += 1
            if failure := self._refusal(request):
                plan.finished.append(self._end(request, FinishReason.ABORTED, failure))
            elif (cached := self._borrow(request, loader, room)) is not None:
                self._waiting.remove(request)
                self._running.start(request, rows, cached, now_s)
                for older in passed_over:
                    older.times_passed_over += 1
            elif not loader.must_wait_for(request.version):
                passed_over.append(request)
                if request.times_passed_over >= self.limits.max_passed_over:
                    return

    def _bring_nearer(self, requests: Iterable[Request], loader: AdapterLoader) -> None:
        for request in requests:
            if request.version:
                loader.want(request.version, watermark=self.num_running)
                self._waiting.park(request)

    def _borrow(self, request: Request, loader: AdapterLoader, room: Room) -> list[int] | None:
        """Its cached pages, if its adapter is resident and there are pages for its other tokens."""
        watermark = self.num_running
        if request.version and loader.want(request.version, watermark=watermark) is None:
            return None
        return self._sharing.borrow(request, room, watermark=watermark)

    def _load_ahead(self, loader: AdapterLoader, now_s: float) -> None:
        """Bring nearer what no request needs yet; most of the fetches are left to those."""
        for version in self._prefetches.due(now_s):
            may_fetch = self.residency.num_fetching < self.limits.max_prefetches
            if may_fetch or self.residency.find(version):
                loader.want(version, watermark=self.num_running)

    def _preempt(self, request: Request, plan: Plan) -> None:
        self._running.leave(request, self.steps)
        request.move_to(RequestState.WAITING)
        self._waiting.add(request)
        plan.preempted.append(request.number)
        self.preemptions += 1

    def _end(
        self, request: Request, reason: FinishReason, failure: Failure | None = None
    ) -> Finished:
        """Free everything that `request` holds."""
        if request.state is RequestState.WAITING:
            self._waiting.remove(request)
        else:
            self._running.leave(request, self.steps)
        request.move_to(RequestState.FINISHED)
        del self.requests[request.number]
        self._deadlines.forget_ended()
        return request.finished(reason, failure)
