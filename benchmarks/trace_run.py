"""One trace through an engine, and what was seen of it."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.driver import Driver, greedy
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
        self._submitted = 0
        self._outstanding = count

    def run(self, prompts: Sequence[list[int]], max_context_tokens: int) -> dict[str, Any]:
        """Serve the trace; at most `max_context_tokens` bound a request's length."""
        driver, engine = self._driver, self._driver.engine
        before, host = engine.status(), engine.host_time
        scheduler_s, launch_s = host.plan_s + host.commit_s, host.launch_s
        replays, padded_rows = driver.replays, driver.padded_rows
        started_s = time.perf_counter()
        while self._outstanding:
            self._submit(prompts, max_context_tokens, time.perf_counter() - started_s)
            if not engine.scheduler.requests:
                time.sleep(IDLE_S)  # nothing has arrived
            events = driver.step()
            self._note(events, time.perf_counter() - started_s)
        seconds = time.perf_counter() - started_s
        after = engine.status()
        steps, replays = after.steps - before.steps, driver.replays - replays
        return self._times(seconds) | {
            "steps": steps,
            "adapter_loads": after.adapter_loads - before.adapter_loads,
            "adapter_evictions": after.adapter_evictions - before.adapter_evictions,
            "preemptions": after.preemptions - before.preemptions,
            "graph_replays": replays,
            "eager_steps": steps - replays,
            "padded_rows": driver.padded_rows - padded_rows,
            "scheduler_ms_per_step": (host.plan_s + host.commit_s - scheduler_s) / steps * 1e3,
            "launch_ms_per_step": (host.launch_s - launch_s) / steps * 1e3,
        }

    def _submit(self, prompts: Sequence[list[int]], max_context_tokens: int, now_s: float) -> None:
        """Submit what has arrived by now."""
        arrived = int(np.searchsorted(self._arrival_s, now_s, side="right"))
        for index in range(self._submitted, arrived):
            request, prompt = self._trace[index], prompts[index]
            version = self._images.version(request.adapter)
            most = max_context_tokens - request.prompt_tokens
            self._driver.engine.handle([greedy(self._first + index, version, prompt, most)])
        self._submitted = arrived

    def _note(self, events: list[m.Event], now_s: float) -> None:
        for event in events:
            if isinstance(event, m.StepTokens):
                self._note_tokens(np.array(event.requests) - self._first, now_s)
            elif isinstance(event, m.Finished):
                self._outstanding -= 1

    def _note_tokens(self, index: np.ndarray, now_s: float) -> None:
        index = index[self._left[index] > 0]
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
            "ttft_s": percentiles(self._first_token_s - self._arrival_s),
            "token_gap_s": percentiles(np.concatenate(self._gaps)),
            "time_per_output_token_s": percentiles(
                decoded_s[several] / (self._length[several] - 1)
            ),
        }


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p50": float(np.percentile(values, 50)),
        "p90": float(np.percentile(values, 90)),
        "p99": float(np.percentile(values, 99)),
    }
