"""What it costs the router to choose the next request, by how many are queued.

    python -m benchmarks.picks

The router's own dispatcher, with its default policies and with each choice of them: 100 tenants,
10,000 adapters by Zipf's law, requests with and without objectives, and eight workers, all full.
Whenever one request has ended, one plan picks the next and its worker; a new request joins, which
is timed apart. Every tenth plan also ranks what to prefetch, which shows in the mean and at 99 %.
"""

import argparse
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, count

from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_result
from lorry.router.actions import Submit
from lorry.router.dispatcher import Dispatcher
from lorry.router.generation import Generation
from lorry.router.places import Amount, Places
from lorry.router.policies import make_policies
from lorry.router.policy_options import PolicyOptions
from lorry.router.request import Request, RequestState
from lorry.router.slo import Slo
from lorry.router.worker import Worker

QUEUED = (1_000, 10_000, 100_000)
TENANTS, ADAPTERS, WORKERS, RUNNING = 100, 10_000, 8, 64
PICK_EVERY_S = 0.01  # of virtual time
PLAIN = PolicyOptions(admission="all", fairness="none", cluster_adapters=0)
OPTIONS = {
    "default": PolicyOptions(),
    "arrival alone": replace(PLAIN, order="arrival", overload_order="arrival"),
    "newest alone": replace(PLAIN, order="newest", overload_order="newest"),
    "deadline alone": replace(PLAIN, order="deadline", overload_order="deadline"),
    "fair to tenants": replace(PLAIN, fairness="tenants"),
    "fair to adapters": replace(PLAIN, fairness="adapters"),
    "8 adapters": replace(PLAIN, cluster_adapters=8),
}


class Load:
    """A dispatcher with so many queued requests, and its workers full."""

    def __init__(self, options: PolicyOptions, num_queued: int) -> None:
        self._random = random.Random(1)
        self._numbers = count()
        self._weights = list(accumulate(1 / number for number in range(1, ADAPTERS + 1)))
        # One object for all requests of an adapter, as the catalogue's is.
        self._versions = [number.to_bytes(32, "big") for number in range(ADAPTERS)]
        everything = Amount(1 << 40, 1 << 60)
        places = Places(limit=everything, tenant_limit=lambda tenant: everything)
        self.dispatcher = Dispatcher(places, make_policies(options), max_prefetch=32)
        self.now_s = 0.0
        for number in range(WORKERS):
            self.dispatcher.attach(
                Worker(
                    name=f"10.0.0.{number}:50053",
                    epoch=1,
                    max_context_tokens=1 << 20,
                    max_rank=64,
                    submit_limit=RUNNING,
                )
            )
        self.running: list[Request] = []
        while len(self.running) < WORKERS * RUNNING:
            self.arrive()
            self.plan()
        for _ in range(num_queued):
            self.arrive()

    def arrive(self) -> None:
        request = self._request()
        self.dispatcher.receive(request)
        self.dispatcher.enqueue(request, self.now_s)

    def plan(self) -> float:
        """Microseconds of CPU time that it took."""
        start_ns = time.thread_time_ns()
        actions = self.dispatcher.plan(self.now_s)
        spent_ns = time.thread_time_ns() - start_ns
        for action in actions:
            if isinstance(action, Submit):
                self.running.append(action.request)
                action.request.output_ids += [1] * 100
                self.dispatcher.drew(action.request, self.now_s)
        return spent_ns / 1e3

    def end_one(self) -> None:
        index = self._random.randrange(len(self.running))
        self.running[index], self.running[-1] = self.running[-1], self.running[index]
        done = self.running.pop()
        worker = next(w for w in self.dispatcher.workers if w.name == done.worker_name)
        worker.raise_submit_limit(worker.submit_limit + 1)
        self.dispatcher.end(done, RequestState.FINISHED)

    def _request(self) -> Request:
        number, rng = next(self._numbers), self._random
        (adapter,) = rng.choices(range(ADAPTERS), cum_weights=self._weights)
        generation = Generation(
            request_id=str(number), tenant=f"t{adapter % TENANTS}", adapter=None, prompt=""
        )
        return Request(
            generation,
            seed=0,
            arrival_s=self.now_s,
            deadline_s=self.now_s + 3600.0,
            slo=Slo(ttft_s=rng.choice([60.0, 600.0, 6000.0, None])),
            prompt_ids=[1] * rng.randrange(8, 512),
            max_tokens=256,
            version=b"" if rng.random() < 0.05 else self._versions[adapter],
            rank=16,
        )


def measure(
    options: PolicyOptions, num_queued: int, *, rounds: int, picks: int
) -> list[dict[str, float]]:
    """Of each round; one queue serves all, as it takes longer to fill than to measure."""
    load = Load(options, num_queued)
    gc.collect()
    gc.freeze()
    figures = [measure_round(load, picks) for _ in range(rounds)]
    gc.unfreeze()
    load.dispatcher.check_integrity()
    return figures


def measure_round(load: Load, picks: int) -> dict[str, float]:
    """Microseconds of CPU time."""
    pick_us, join_us = list[float](), list[float]()
    for _ in range(picks):
        load.now_s += PICK_EVERY_S
        load.end_one()
        pick_us.append(load.plan())
        start_ns = time.thread_time_ns()
        load.arrive()
        join_us.append((time.thread_time_ns() - start_ns) / 1e3)
    return {
        "pick_us": statistics.median(pick_us),
        "pick_mean_us": statistics.fmean(pick_us),
        "pick_p99_us": _percentile(pick_us, 0.99),
        "join_us": statistics.median(join_us),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picks", type=int, default=1000)
    arguments = parser.parse_args()
    table = Table("policies", "queued", "pick, us", "mean", "p99", "join, us")
    metrics: dict[str, dict[str, dict[str, float]]] = {name: {} for name in OPTIONS}
    for name, options in OPTIONS.items():
        for num_queued in QUEUED:
            rounds = measure(options, num_queued, rounds=arguments.rounds, picks=arguments.picks)
            median = {k: round(statistics.median(r[k] for r in rounds), 1) for k in rounds[0]}
            metrics[name][str(num_queued)] = median
            table.add_row(name, f"{num_queued:,}", *(f"{value:.0f}" for value in median.values()))
    Console().print(table)
    write_result(
        "picks",
        benchmark="picks",
        device=f"{platform.machine()}, {os.cpu_count()} cores",
        config={
            "rounds": arguments.rounds,
            "picks": arguments.picks,
            "tenants": TENANTS,
            "adapters": ADAPTERS,
            "workers": WORKERS,
        },
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
