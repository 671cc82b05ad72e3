"""A router on the virtual clock: the real dispatcher and its policies, told what workers do.

It does for the dispatcher what `lorry.router.fleet` does, without text and without a network.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.sequences import Sequence as WorkerSequence
from benchmarks.simulation.worker import SimulatedWorker
from lorry.client.bench.record import OK, Record
from lorry.router.actions import Abort, Prefetch, Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.generation import Generation
from lorry.router.request import Request, RequestState
from lorry.router.slo import Slo
from lorry.router.worker import Worker, WorkerStatus
from lorry.rpc.errors import LorryError

STATUS_S = 1.0
MAX_REQUEST_S = 3600.0
MAX_CONTEXT_TOKENS = 1 << 20
S = RequestState


@dataclass(frozen=True, slots=True)
class SimulatedAdapter:
    version: bytes  # empty: the base model
    rank: int = 0
    num_bytes: int = 0


class SimulatedRouter:
    """`on_submit` hears of every decision; `records` are those of the requests that have ended."""

    def __init__(
        self,
        clock: Clock,
        dispatcher: Dispatcher,
        on_submit: Callable[[Submit], None] = lambda submit: None,
    ) -> None:
        self.records: list[Record] = []
        self._clock = clock
        self._dispatcher = dispatcher
        self._on_submit = on_submit
        self._workers: dict[str, SimulatedWorker] = {}
        self._attached: dict[str, Worker] = {}
        self._records: dict[Request, Record] = {}
        self._sizes: dict[bytes, int] = {b"": 0}
        self._is_planning = False
        self._planned_s = float("inf")  # when it plans again though nothing happens

    def attach(self, worker: SimulatedWorker) -> None:
        self._workers[worker.name] = worker
        attached = Worker(
            name=worker.name,
            epoch=1,
            max_context_tokens=MAX_CONTEXT_TOKENS,
            max_rank=256,
            submit_limit=worker.window,
            max_running=worker.limits.max_running,
            step_tokens=worker.limits.step_tokens,
        )
        self._attached[worker.name] = attached
        self._dispatcher.attach(attached)
        self._tell_status(worker)

    def lose(self, name: str) -> None:
        """The worker is gone with all that it held; its requests go elsewhere."""
        self._workers.pop(name).die()
        for request in self._dispatcher.lose(self._attached.pop(name)):
            self._finish(request, S.FAILED, "ABORTED", "WORKER_LOST")
        self._plan_soon()

    def arrive(self, record: Record, adapter: SimulatedAdapter) -> None:
        """Take a request now."""
        planned, now_s = record.planned, self._clock.now_s
        slo = Slo(ttft_s=_finite(record.slo.ttft_s), tpot_s=_finite(record.slo.tpot_s))
        generation = Generation(
            request_id=str(record.index),
            tenant=planned.tenant,
            adapter=None,
            prompt="",
            max_tokens=planned.output_tokens,
        )
        request = Request(
            generation, seed=0, arrival_s=now_s, deadline_s=now_s + MAX_REQUEST_S, slo=slo
        )
        request.prompt_ids, request.max_tokens = range(planned.prompt_tokens), planned.output_tokens
        request.version, request.rank = adapter.version, adapter.rank
        request.adapter_bytes = self._sizes[adapter.version] = adapter.num_bytes
        record.sent_s = now_s
        try:
            self._dispatcher.receive(request)
        except LorryError as error:
            self._note_end(record, error.code.name, error.reason)
            return
        self._records[request] = record
        try:
            self._dispatcher.enqueue(request, now_s)
        except LorryError as error:
            self._finish(request, S.FAILED, error.code.name, error.reason)
        self._plan_soon()

    def first_token(self, worker_name: str, seq: int) -> None:
        request = self._attached[worker_name].active[seq]
        if request.first_token_s is None:
            request.first_token_s = self._clock.now_s
            self._records[request].first_token_s = self._clock.now_s
        self._draw(request, 1)
        self._plan_soon()

    def more_tokens(self, worker_name: str, seq: int, count: int) -> None:
        self._draw(self._attached[worker_name].active[seq], count)

    def ended(self, worker_name: str, seq: int) -> None:
        worker = self._attached[worker_name]
        request = worker.active[seq]
        record = self._records[request]
        record.output_tokens = record.planned.output_tokens
        self._draw(request, record.output_tokens - len(request.output_ids))
        record.last_token_s = self._clock.now_s
        self._finish(request, S.FINISHED, OK, "")
        worker.raise_submit_limit(worker.submit_limit + 1)
        self._plan_soon()

    def resident(self, worker_name: str, version: bytes, *, is_resident: bool) -> None:
        changed = ([version], []) if is_resident else ([], [version])
        if worker_name in self._attached:
            self._attached[worker_name].update_residency(
                snapshot=False, gpu=changed, host=([version], [])
            )

    def check_integrity(self) -> None:
        self._dispatcher.check_integrity()
        for worker in self._workers.values():
            worker.check_integrity()

    def _draw(self, request: Request, count: int) -> None:
        request.last_token_s = self._clock.now_s
        request.output_ids.extend([0] * count)
        self._dispatcher.drew(request, self._clock.now_s)

    def _plan_soon(self) -> None:
        """Once for all that happens now."""
        if not self._is_planning:
            self._is_planning = True
            self._clock.at(self._clock.now_s, self._plan)

    def _plan(self) -> None:
        self._is_planning = False
        for action in self._dispatcher.plan(self._clock.now_s):
            match action:
                case Submit():
                    self._submit(action)
                case Prefetch(worker, versions):
                    sizes = {version: self._sizes[version] for version in versions}
                    self._workers[worker.name].prefetch(versions, sizes)
                case Abort(request):
                    self._finish(request, S.FAILED, "RESOURCE_EXHAUSTED", "SLO_UNATTAINABLE")
        next_s = self._dispatcher.next_plan_s
        if next_s is not None and next_s < self._planned_s:
            self._planned_s = next_s
            self._clock.at(next_s, self._plan_in_time)

    def _plan_in_time(self) -> None:
        self._planned_s = float("inf")
        self._plan_soon()

    def _submit(self, submit: Submit) -> None:
        request = submit.request
        self._on_submit(submit)
        if request.submitted_s is None:
            request.submitted_s = self._clock.now_s
        sequence = WorkerSequence(
            seq=submit.seq,
            version=request.version,
            rank=request.rank,
            prompt_tokens=len(request.prompt_ids) + len(request.output_ids),
            output_tokens=request.max_tokens - len(request.output_ids),
        )
        self._workers[submit.worker.name].submit(sequence, request.adapter_bytes)

    def _finish(self, request: Request, state: RequestState, code: str, reason: str) -> None:
        place = self._dispatcher.end(request, state)
        if place is not None and place.worker_name in self._workers:
            self._workers[place.worker_name].cancel(place.seq)
        self._note_end(self._records.pop(request), code, reason)

    def _note_end(self, record: Record, code: str, reason: str) -> None:
        record.code, record.reason, record.ended_s = code, reason, self._clock.now_s
        self.records.append(record)

    def _tell_status(self, worker: SimulatedWorker) -> None:
        """Every second, as workers do."""
        if worker.name not in self._workers:
            return
        status = WorkerStatus(
            running=worker.num_running,
            waiting=len(worker.waiting),
            queued_prompt_tokens=worker.queued_prompt_tokens,
            pages_total=worker.limits.pool_pages,
            pages_free=worker.pool.free,
            pages_adapter=worker.adapters.pages,
            pages_adapter_idle=worker.adapters.idle_pages,
            prefill_tokens_per_s=worker.measures.prefill_tokens_per_s,
            step_s=sorted(worker.measures.step_s.items()),
            adapter_load_bytes_per_s=worker.limits.load_bytes_per_s,
        )
        self._dispatcher.hear(self._attached[worker.name], status, self._clock.now_s)
        self._plan_soon()
        self._clock.at(self._clock.now_s + STATUS_S, lambda: self._tell_status(worker))


def _finite(seconds: float) -> float | None:
    return seconds if seconds < float("inf") else None
