"""What the engine measures of itself, for the routers' decisions and the operators' eyes."""

from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from lorry.kernels.page_layout import BASE_MODEL
from lorry.worker.messages import Status
from lorry.worker.plan import Batch
from lorry.worker.request import RequestState
from lorry.worker.runner import RunCounts
from lorry.worker.scheduler import Scheduler
from lorry.worker.statistics import StepStatistics, Transfers, loads
from lorry.worker.step_fit import StepFit

SMOOTHING = 0.1  # weight of the newest measurement in a moving average


@dataclass(slots=True)
class Gauges:
    """Counters and moving averages; an average is 0 until its first measurement."""

    prefill_tokens_per_s: float = 0.0
    step_times_ms: dict[int, float] = field(default_factory=dict)  # by rows, decodes only
    adapter_load_bytes_per_s: float = 0.0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    max_adapters_in_step: int = 0
    max_adapters_beside_base_in_step: int = 0
    fit: StepFit = field(default_factory=StepFit)
    steps: StepStatistics = field(default_factory=StepStatistics)
    loads: Transfers = field(default_factory=loads)

    def note_step(self, batch: Batch, seconds: float) -> None:
        slots = np.unique(batch.slot_S)
        adapters = int((slots != BASE_MODEL).sum())
        self.max_adapters_in_step = max(self.max_adapters_in_step, adapters)
        if adapters < len(slots):
            beside_base = self.max_adapters_beside_base_in_step
            self.max_adapters_beside_base_in_step = max(beside_base, adapters)
        self.steps.note(
            seconds,
            decodes_only=batch.is_decode_only,
            rows=batch.num_tokens,
            sequences=len(batch.row_S),
            adapters=adapters,
        )
        self.fit.note(batch.num_tokens, seconds)
        if batch.is_decode_only:
            rows = 1 << (len(batch.row_S) - 1).bit_length()
            before = self.step_times_ms.get(rows, 0.0)
            self.step_times_ms[rows] = _average(before, seconds * 1e3)
        else:
            rate = self.fit.rows_per_s(batch.num_tokens, seconds)
            self.prefill_tokens_per_s = _average(self.prefill_tokens_per_s, rate)

    def note_load(self, source: str, num_bytes: int, seconds: float) -> None:
        self.adapter_loads += 1
        self.loads.note(source, num_bytes, seconds)
        rate = num_bytes / seconds
        self.adapter_load_bytes_per_s = _average(self.adapter_load_bytes_per_s, rate)

    def status(self, scheduler: Scheduler, runs: RunCounts) -> Status:
        pool, table, prefixes = scheduler.pool, scheduler.table, scheduler.prefixes
        queued = sum(
            len(request.token_ids)
            if request.state is RequestState.WAITING
            else max(0, int(table.num_tokens_R[request.row] - table.num_computed_R[request.row]))
            for request in scheduler.requests.values()
            if request.state is not RequestState.DECODE
        )
        return Status(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            queued_prompt_tokens=queued,
            pages_total=pool.total,
            pages_free=pool.free,
            pages_kv=pool.kv + pool.prefix - len(prefixes.idle),
            pages_adapter=pool.adapter,
            pages_adapter_idle=scheduler.residency.idle_pages,
            pages_cached=len(prefixes.idle),
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            step_times_ms=dict(sorted(self.step_times_ms.items())),
            adapter_load_bytes_per_s=self.adapter_load_bytes_per_s,
            steps=scheduler.steps,
            preemptions=scheduler.preemptions,
            adapter_loads=self.adapter_loads,
            adapter_evictions=self.adapter_evictions,
            max_adapters_in_step=self.max_adapters_in_step,
            max_adapters_beside_base_in_step=self.max_adapters_beside_base_in_step,
            graph_replays=runs.graph_replays,
            eager_steps=runs.eager_steps,
            padded_rows=runs.padded_rows,
            step_statistics=deepcopy(self.steps),
            loads=deepcopy(self.loads),
            prefix_query_tokens=prefixes.query_tokens,
            prefix_hit_tokens=prefixes.hit_tokens,
            prefix_evictions=prefixes.evictions,
        )


def _average(before: float, measured: float) -> float:
    return before + SMOOTHING * (measured - before) if before else measured
