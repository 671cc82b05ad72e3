"""One trace through an engine, and what was seen of it."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.driver import Driver, greedy
from benchmarks.pool_split import PoolSplit
from benchmarks.random_images import RandomImages
from lorry.client.bench.trace import TraceRequest
from lorry.worker import messages as m
from lorry.worker.engine import Engine

IDLE_S = 0.0005


class TraceRun:
    """Submits the requests at once, or each at its arrival, and ends each at its length."""

    def __init__(
        self,
        engine: Engine,
        images: RandomImages,
        trace: Sequence[TraceRequest],
        *,
        first: int,
        at_arrivals: bool,
    ) -> None:
        self._driver = Driver(engine, images, [r.adapter for r in trace])
        self._images = images
        self._trace = trace
        self._first = first  # number of the first request
        count = len(trace)
        self._arrival_s = np.array([r.arrival_s for r in trace]) * at_arrivals
        self._length = np.array([request.output_tokens for request in trace])
        self._left = self._length.copy()
        self._first_token_s = np.zeros(count)
        self._last_token_s = np.zeros(count)
        self._gaps: list[np.ndarray] = []
        self._drawn: list[tuple[np.ndarray, np.ndarray]] = []  # requests' places and their tokens
        self._submitted = 0
        self._outstanding = count

    def run(self, prompts: Sequence[list[int]], max_context_tokens: int) -> dict[str, Any]:
        """Serve the trace; at most `max_context_tokens` bound a request's length."""
        self.start(prompts, max_context_tokens)
        while self.is_outstanding:
            self.advance()
        return self.metrics()

    def start(self, prompts: Sequence[list[int]], max_context_tokens: int) -> None:
        """Start the clock."""
        self._prompts, self._max_context_tokens = prompts, max_context_tokens
        self._before = _Counts.of(self._driver)
        self._split = PoolSplit(self._driver.engine.scheduler.pool)
        self._started_s = self._ended_s = time.perf_counter()

    @property
    def is_outstanding(self) -> bool:
        return self._outstanding > 0

    def advance(self) -> None:
        """Submit what has arrived and run a step."""
        self._submit(time.perf_counter() - self._started_s)
        if not self._driver.engine.scheduler.requests:
            time.sleep(IDLE_S)  # nothing has arrived
        events = self._driver.step()
        self._ended_s = time.perf_counter()
        self._note(events, self._ended_s - self._started_s)
        self._split.note(self._ended_s - self._started_s)

    @property
    def tokens(self) -> list[list[int]]:
        """Of each request, up to its length."""
        drawn: list[list[int]] = [[] for _ in self._trace]
        for index, token_ids in self._drawn:
            for place, token_id in zip(index.tolist(), token_ids.tolist(), strict=True):
                drawn[place].append(token_id)
        return drawn

    @property
    def first_token_delays_s(self) -> np.ndarray:
        """Of each request, from its arrival."""
        delays_s: np.ndarray = self._first_token_s - self._arrival_s
        return delays_s

    def metrics(self) -> dict[str, Any]:
        """Of the trace that was served."""
        before, after = self._before, _Counts.of(self._driver)
        steps, replays = after.steps - before.steps, after.replays - before.replays
        return self._times(self._ended_s - self._started_s) | {
            "steps": steps,
            "adapter_loads": after.adapter_loads - before.adapter_loads,
            "adapter_evictions": after.adapter_evictions - before.adapter_evictions,
            "preemptions": after.preemptions - before.preemptions,
            "graph_replays": replays,
            "eager_steps": steps - replays,
            "padded_rows": after.padded_rows - before.padded_rows,
            "scheduler_ms_per_step": (after.scheduler_s - before.scheduler_s) / steps * 1e3,
            "launch_ms_per_step": (after.launch_s - before.launch_s) / steps * 1e3,
            "pool_pages": self._split.samples(),
        }

    def _submit(self, now_s: float) -> None:
        """Submit what has arrived by now."""
        arrived = int(np.searchsorted(self._arrival_s, now_s, side="right"))
        for index in range(self._submitted, arrived):
            request, prompt = self._trace[index], self._prompts[index]
            version = self._images.version(request.adapter)
            most = self._max_context_tokens - request.prompt_tokens
            self._driver.engine.handle([greedy(self._first + index, version, prompt, most)])
        self._submitted = arrived

    def _note(self, events: list[m.Event], now_s: float) -> None:
        for event in events:
            if isinstance(event, m.StepTokens):
                self._note_tokens(event, now_s)
            elif isinstance(event, m.Finished):
                self._outstanding -= 1

    def _note_tokens(self, event: m.StepTokens, now_s: float) -> None:
        index = np.array(event.requests) - self._first
        is_asked = self._left[index] > 0
        index = index[is_asked]
        self._drawn.append((index, np.array(event.token_ids)[is_asked]))
        is_first = self._left[index] == self._length[index]
        self._gaps.append(now_s - self._last_token_s[index[~is_first]])
        self._first_token_s[index[is_first]] = now_s
        self._last_token_s[index] = now_s
        self._left[index] -= 1
        done = index[self._left[index] == 0]
        if len(done):
            self._driver.engine.handle([m.Cancel((done + self._first).tolist())])

    def _times(self, seconds: float) -> dict[str, Any]:
        decoded_s = self._last_token_s - self._first_token_s
        several = self._length > 1
        return {
            "seconds": seconds,
            "req_per_s": len(self._trace) / seconds,
            "out_tok_per_s": int(self._length.sum()) / seconds,
            "latency_s": percentiles(self._last_token_s - self._arrival_s),
            "ttft_s": percentiles(self.first_token_delays_s),
            "token_gap_s": percentiles(np.concatenate(self._gaps)),
            "time_per_output_token_s": percentiles(
                decoded_s[several] / (self._length[several] - 1)
            ),
        }


class _Counts(NamedTuple):
    """What an engine and its driver have counted so far."""

    steps: int
    replays: int
    padded_rows: int
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    scheduler_s: float
    launch_s: float

    @classmethod
    def of(cls, driver: Driver) -> "_Counts":
        status, host = driver.engine.status(), driver.engine.host_time
        return cls(
            steps=status.steps,
            replays=driver.replays,
            padded_rows=driver.padded_rows,
            adapter_loads=status.adapter_loads,
            adapter_evictions=status.adapter_evictions,
            preemptions=status.preemptions,
            scheduler_s=host.plan_s + host.commit_s,
            launch_s=host.launch_s,
        )


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p50": float(np.percentile(values, 50)),
        "p90": float(np.percentile(values, 90)),
        "p99": float(np.percentile(values, 99)),
    }
