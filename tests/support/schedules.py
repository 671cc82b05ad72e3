"""A scheduler driven without a model."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from lorry.worker import messages as m
from lorry.worker.drawn import Drawn
from lorry.worker.plan import Batch, Plan
from lorry.worker.pool import PagePool
from lorry.worker.scheduler import Scheduler
from lorry.worker.scheduler_limits import SchedulerLimits
from lorry.worker.sequences import SequenceTable

PAGE_TOKENS = 4
STOP = 99


class Driver:
    """Carries out plans without a model: every token is 1 until told otherwise.

    With `max_in_flight` 2, a step's results are read once the next one is launched.
    """

    def __init__(
        self,
        *,
        pages: int = 64,
        adapter_pages: dict[bytes, int] | None = None,
        instant_fetch: bool = True,
        prefix_cache: bool = False,
        max_in_flight: int = 1,
        **limits: int,
    ) -> None:
        defaults = {"step_tokens": 16, "max_running": 8, "max_context_tokens": 128}
        merged = defaults | limits
        self.scheduler = Scheduler(
            SchedulerLimits(**merged, prefix_cache=prefix_cache),
            PagePool(pages + 1),
            SequenceTable(merged["max_running"], merged["max_context_tokens"], PAGE_TOKENS),
        )
        self.adapter_pages = adapter_pages or {}
        self.instant_fetch = instant_fetch
        self.now_s = 0.0
        self.next_token = 1
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, m.Finished] = {}
        self.plans: list[Plan] = []
        self.on_batch: Callable[[Batch], object] = lambda batch: None
        self.on_load: Callable[[list[int]], object] = lambda pages: None
        self._max_in_flight = max_in_flight
        self._in_flight = deque[tuple[Batch, np.ndarray]]()

    def submit(self, number: int, prompt: int, max_tokens: int, version: bytes = b"") -> None:
        self.send(number, prompt, max_tokens, version=version)

    def send(
        self,
        number: int,
        prompt: int | list[int],
        max_tokens: int,
        *,
        version: bytes = b"",
        remaining_s: float | None = None,
        **fields: Any,
    ) -> None:
        """A number of tokens stands for a prompt of as many equal ones."""
        defaults: dict[str, Any] = {"tenant": "default", "generated_tokens": 0}
        submit = m.Submit(
            request=number,
            version=version,
            token_ids=[3] * prompt if isinstance(prompt, int) else prompt,
            max_tokens=max_tokens,
            min_tokens=0,
            stop_token_ids=[STOP],
            temperature=0.0,
            seed=0,
            remaining_s=remaining_s,
            **(defaults | fields),
        )
        self.tokens[number] = []
        self.note(self.scheduler.submit(submit, self.now_s))

    def note(self, *finished: m.Finished | None) -> None:
        for end in finished:
            if end is not None:
                assert end.request not in self.finished
                self.finished[end.request] = end

    def step(self) -> Plan:
        scheduler = self.scheduler
        plan = scheduler.plan(self.now_s, [])
        self.plans.append(plan)
        self.note(*plan.finished)
        scheduler.check_integrity()
        if self.instant_fetch:
            for version in plan.fetches:
                self.finish_fetch(version)
        for adapter in plan.loads:
            self.on_load(adapter.pages)
            scheduler.residency.finish_load(adapter, self.now_s)
        if plan.batch is not None:
            drawn = np.full(int(plan.batch.samples_S.sum()), self.next_token, dtype=np.int32)
            self.on_batch(plan.batch)
            self._in_flight.append((plan.batch, drawn))
        keep = self._max_in_flight - 1 if plan.batch is not None else 0
        while len(self._in_flight) > keep:
            self._read(*self._in_flight.popleft())
            scheduler.check_integrity()
        self.now_s += 1.0
        return plan

    def _read(self, batch: Batch, drawn: np.ndarray) -> None:
        tokens, finished = self.scheduler.commit(batch, Drawn(drawn), self.now_s)
        for number, token_id in zip(tokens.requests, tokens.token_ids, strict=True):
            self.tokens[number].append(token_id)
        self.note(*finished)

    def finish_fetch(self, version: bytes) -> None:
        adapter = self.scheduler.residency.find(version)
        assert adapter is not None
        image = m.ImageReady(version, "", 0, 0, self.adapter_pages[version], 8, [])
        self.scheduler.finish_fetch(adapter, image)

    def run(self, most_steps: int = 3000) -> None:
        for _ in range(most_steps):
            if not self.scheduler.requests:
                return
            self.step()
        raise AssertionError(f"never finished: {sorted(self.scheduler.requests)}")

    def rows_of(self, plan: Plan) -> dict[int, int]:
        """Rows of each request in the step."""
        batch = plan.batch
        assert batch is not None
        numbers = self.scheduler.table.number_R[batch.row_S].tolist()
        return dict(zip(numbers, batch.length_S.tolist(), strict=True))
