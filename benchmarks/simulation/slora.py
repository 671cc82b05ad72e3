"""S-LoRA's own scheduling loop, on the virtual clock: what its recorded results are compared with.

Facts of S-LoRA's published code: a mini-batch of waiting requests is taken when nothing runs, else
after every tenth decode step, and its prompts are computed alone while the others stall. Requests
are taken in the policy's order until one does not fit: the worst case of tokens over the rest of
the batch's life, with each request's asked output, must stay within the pool beside the distinct
adapters. Early abort: whoever has waited for 5.5 s of the 6 goes, and while moving averages say
that more arrive than are taken, the newest go first.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.simulation.costs import StepCosts
from lorry.client.bench.record import OK, Record, Slo
from lorry.client.bench.trace import TraceRequest

Policy = Literal["fcfs", "lcfs", "abort"]
TTFT_S = 6.0
ABORT_WAIT_S = TTFT_S - 0.5
WAIT_STEPS = 10
BATCH_PROMPT_TOKENS = 3072
IDLE_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SLoraSetting:
    costs: StepCosts
    pool_tokens: int
    ranks: Sequence[int]
    load_s_per_rank: float  # of an adapter that the last batch did not have


@dataclass(slots=True, eq=False)
class _Running:
    record: Record
    run_tokens: int
    left_tokens: int


@dataclass(slots=True)
class SLora:
    """One GPU; `run` gives the records of a trace under one of S-LoRA's policies."""

    setting: SLoraSetting
    policy: Policy
    _now_s: float = 0.0
    _waiting: list[Record] = field(default_factory=list)  # by arrival
    _running: list[_Running] = field(default_factory=list)
    _resident: set[int] = field(default_factory=set)
    _arrived: float = 0.0  # moving averages of early abort, truncated to whole numbers
    _taken: float = 1.0
    _last_waiting: int = 0

    def run(self, trace: Sequence[TraceRequest]) -> list[Record]:
        records = [
            Record(index, planned, Slo(ttft_s=TTFT_S)) for index, planned in enumerate(trace)
        ]
        coming, steps_since = list(reversed(records)), 0
        while coming or self._waiting or self._running:
            while coming and coming[-1].planned.arrival_s <= self._now_s:
                self._waiting.append(coming.pop())
            batch = []
            if not self._running or steps_since >= WAIT_STEPS:
                batch = self._next_batch()
            if batch:
                self._prefill(batch)
                steps_since = 0
            elif self._running:
                self._decode()
                steps_since += 1
            else:
                self._now_s += IDLE_S
        return records

    def _next_batch(self) -> list[Record]:
        newest_first = self.policy == "lcfs"
        if self.policy == "abort":
            self._abort_late()
            grown = len(self._waiting) - self._last_waiting
            self._arrived = int(0.7 * grown + 0.3 * self._arrived)
            newest_first = self._arrived >= self._taken
        batch = self._fitting(reversed(self._waiting) if newest_first else self._waiting)
        if batch:
            self._taken = max(int(0.7 * len(batch) + 0.3 * self._taken), 1)
            chosen = set(map(id, batch))
            self._waiting = [r for r in self._waiting if id(r) not in chosen]
            self._last_waiting = len(self._waiting)
        return batch

    def _abort_late(self) -> None:
        kept = []
        for record in self._waiting:
            if self._now_s - record.planned.arrival_s < ABORT_WAIT_S:
                kept.append(record)
            else:
                record.code, record.ended_s = "ABORTED", self._now_s
        self._waiting = kept

    def _fitting(self, candidates: Iterable[Record]) -> list[Record]:
        """The first of them that fit; the first that does not ends the batch."""
        lives = sorted((-one.left_tokens, one.run_tokens) for one in self._running)
        adapters = {one.record.planned.adapter for one in self._running}
        batch: list[Record] = []
        prompt_tokens = 0
        for record in candidates:
            planned = record.planned
            prompt_tokens += planned.prompt_tokens
            adapters.add(planned.adapter)
            bisect.insort(lives, (1 - planned.output_tokens, planned.prompt_tokens + 1))
            free = self.setting.pool_tokens - 4 * sum(map(self._rank, adapters))
            if prompt_tokens > BATCH_PROMPT_TOKENS or _most_tokens(lives) >= free:
                break
            batch.append(record)
        return batch

    def _prefill(self, batch: list[Record]) -> None:
        adapters = {record.planned.adapter for record in batch}
        absent = adapters - self._resident
        self._now_s += self.setting.load_s_per_rank * sum(map(self._rank, absent))
        self._resident |= adapters
        self._now_s += self.setting.costs.step_s(
            rows=sum(record.planned.prompt_tokens for record in batch),
            sampled=len(batch),
            kv_tokens=0,
            rank_sum=sum(map(self._rank, adapters)),
        )
        for record in batch:
            record.first_token_s = self._now_s
            planned = record.planned
            self._running.append(
                _Running(record, planned.prompt_tokens + 1, planned.output_tokens - 1)
            )
        self._end_done()

    def _decode(self) -> None:
        adapters = {one.record.planned.adapter for one in self._running}
        self._now_s += self.setting.costs.step_s(
            rows=len(self._running),
            sampled=len(self._running),
            kv_tokens=sum(one.run_tokens for one in self._running),
            rank_sum=sum(map(self._rank, adapters)),
        )
        for one in self._running:
            one.run_tokens += 1
            one.left_tokens -= 1
        self._end_done()

    def _end_done(self) -> None:
        """Whoever is done leaves, and with them the adapters that nobody uses."""
        done = [one for one in self._running if one.left_tokens <= 0]
        if not done:
            return
        for one in done:
            record = one.record
            record.code, record.ended_s, record.last_token_s = OK, self._now_s, self._now_s
            record.output_tokens = record.planned.output_tokens
        self._running = [one for one in self._running if one.left_tokens > 0]
        self._resident = {one.record.planned.adapter for one in self._running}

    def _rank(self, adapter: int) -> int:
        return self.setting.ranks[adapter % len(self.setting.ranks)] if adapter >= 0 else 0


def _most_tokens(lives: Sequence[tuple[int, int]]) -> int:
    """The most tokens at any time, if whoever is done leaves; by (-left, run), longest first."""
    most = run_sum = 0
    for number, (negative_left, run_tokens) in enumerate(lives, start=1):
        run_sum += run_tokens
        most = max(most, -negative_left * number + run_sum)
    return most
