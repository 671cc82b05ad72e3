"""The simulator on virtual time: counts, invariants and its agreement with what was measured."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulation import h200
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.run import Setting, Simulation
from benchmarks.simulation.worker import PAGE_TOKENS, WorkerLimits
from lorry.client.bench.record import Record, Slo
from lorry.client.bench.trace import TraceRequest, TraceSpec, make_trace
from lorry.router.actions import Submit
from lorry.router.backlog import Backlog
from lorry.router.clustering import AdapterClustering
from lorry.router.policies import make_policies
from lorry.router.policy_options import PolicyOptions
from lorry.router.request import Request
from lorry.router.worker import Worker

COSTS = LinearCosts(step_ms=10.0, row_ms=0.02, kv_token_ms=0.0001, rank_ms=0.01)
PLAIN = PolicyOptions(order="arrival", admission="all", fairness="none", cluster_adapters=0)


def setting(**limits: Any) -> Setting:
    return Setting(costs=COSTS, limits=WorkerLimits(**limits), options=PLAIN)


def checked(simulation: Simulation) -> list[Record]:
    """Run it; everything is free afterwards."""
    records = simulation.run()
    simulation.router.check_integrity()
    for worker in simulation.workers:
        assert worker.num_running == len(worker.waiting) == 0
        assert worker.pool.free + worker.adapters.pages == worker.limits.pool_pages
    assert not simulation.dispatcher.requests
    return records


def test_events_happen_in_the_order_of_their_times_and_of_asking() -> None:
    clock, seen = Clock(), list[str]()
    for time_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        clock.at(time_s, functools.partial(seen.append, name))
    clock.run(lambda: False)
    assert seen == ["a", "b", "c"]
    assert clock.now_s == 2.0


def test_a_request_alone_takes_its_steps() -> None:
    simulation = Simulation(setting(), [TraceRequest(1.0, -1, 100, 11)])
    (record,) = checked(simulation)
    assert simulation.workers[0].counts.steps == 11
    assert record.ttft_s == pytest.approx(0.010 + 0.002)
    assert record.tpot_s == pytest.approx(0.010, rel=0.01)
    assert record.output_tokens == 11


def test_times_per_output_token_that_are_asked_for_are_kept_under_overload() -> None:
    trace = make_trace(TraceSpec(requests=400, adapters=20, rate=80.0))
    asked = replace(h200.fitted(), slo=Slo(ttft_s=1.0, tpot_s=0.013))
    met = {}
    for share in (0.9, 0.0):
        options = PolicyOptions(tpot_share=share)
        records = checked(Simulation(replace(asked, options=options), trace))
        met[share] = sum(record.met_slo for record in records)
    assert met[0.9] > 1.5 * met[0.0]


def test_an_absent_adapter_is_fetched_and_loaded_before_the_first_step() -> None:
    limits = {"fetch_s": 0.5, "load_bytes_per_s": 64 << 20}
    trace = [TraceRequest(0.0, 0, 10, 1), TraceRequest(5.0, 0, 10, 1)]
    first, second = checked(Simulation(setting(**limits), trace))
    assert first.ttft_s == pytest.approx(0.5 + 16 / 64 + 0.0102, rel=0.05)  # 16 MiB
    assert second.ttft_s == pytest.approx(0.0102, rel=0.05)


def test_prompts_are_cut_to_the_budget_of_a_step() -> None:
    simulation = Simulation(setting(step_tokens=64), [TraceRequest(0.0, -1, 200, 1)])
    checked(simulation)
    assert simulation.workers[0].counts.steps == 4


def test_a_small_pool_preempts_and_evicts_and_still_serves_all() -> None:
    limits = {"pool_pages": 128, "page_bytes": 4 << 20, "max_running": 32}
    trace = make_trace(TraceSpec(requests=100, adapters=12, rate=200.0))
    simulation = Simulation(setting(**limits), trace)
    records = checked(simulation)
    (worker,) = simulation.workers
    assert worker.counts.preemptions > 0
    assert worker.adapters.num_loads > 12
    assert all(record.ok for record in records)
    needed = sum(request.output_tokens for request in trace)
    assert worker.counts.output_tokens >= needed


def test_no_more_run_than_may_and_no_more_are_sent_than_the_window() -> None:
    limits = WorkerLimits(max_running=4, max_waiting=2)
    most = Counter[str]()

    def note(submit: Any) -> None:
        most["sent"] = max(most["sent"], len(submit.worker.active))

    trace = make_trace(TraceSpec(requests=50, adapters=3, rate=100.0))
    one = replace(setting(), limits=limits)
    checked(Simulation(one, trace, on_submit=note))
    assert most["sent"] == 6


def test_a_lost_worker_loses_no_request() -> None:
    trace = make_trace(TraceSpec(requests=200, adapters=8, rate=20.0))
    simulation = Simulation(replace(setting(), num_workers=3), trace)
    simulation.clock.at(5.0, lambda: simulation.router.lose("w1"))
    records = simulation.run()
    assert all(record.ok for record in records)
    assert simulation.dispatcher.num_requeued > 0
    assert sum(record.output_tokens for record in records) == sum(r.output_tokens for r in trace)


def test_a_halved_worker_takes_twice_as_long() -> None:
    trace = [TraceRequest(0.0, -1, 10, 100)]
    normal, slow = Simulation(setting(), trace), Simulation(setting(), trace)
    slow.workers[0].slowness = 2.0
    times = [checked(simulation)[0].latency_s or 0.0 for simulation in (normal, slow)]
    assert times[1] == pytest.approx(2 * times[0])


def test_twenty_thousand_requests_under_every_policy_end_once_each() -> None:
    options = PolicyOptions(
        order="deadline",
        overload_order="newest",
        admission="early-abort",
        fairness="adapters",
        cluster_adapters=8,
    )
    spec = TraceSpec(requests=20_000, adapters=500, rate=50.0, cv=2.0, tenants={"a": 1, "b": 2})
    crowd = Setting(
        costs=COSTS,
        limits=WorkerLimits(pool_pages=20_000),
        num_workers=4,
        options=options,
        slo=Slo(ttft_s=2.0),
    )
    simulation = Simulation(crowd, make_trace(spec))
    records = checked(simulation)
    assert [record.index for record in records] == list(range(20_000))
    ended = Counter(record.code for record in records)
    assert set(ended) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert ended["OK"] > 10_000
    assert all(
        record.output_tokens == record.planned.output_tokens for record in records if record.ok
    )
    assert not any(record.admitted for record in records if not record.ok)
    drawn = sum(worker.counts.output_tokens for worker in simulation.workers)
    assert drawn == sum(record.output_tokens for record in records)  # aborts cost nothing
    pages = -(-max(r.prompt_tokens + r.output_tokens for r in make_trace(spec)) // PAGE_TOKENS)
    assert all(worker.pool.free > pages for worker in simulation.workers)


def test_nobody_goes_before_whoever_was_passed_over_for_as_long_as_may_be() -> None:
    passed_s, num_overdue = dict[Request, float](), 0

    class Noting(AdapterClustering):
        def instead_of(
            self,
            request: Request,
            worker: Worker,
            preferred: Callable[[], Worker],
            backlog: Backlog,
        ) -> Request | None:
            other = super().instead_of(request, worker, preferred, backlog)
            if other is not None:
                passed_s.setdefault(request, simulation.clock.now_s)
            return other

    def check_sent(submit: Submit) -> None:
        nonlocal num_overdue
        now_s = simulation.clock.now_s
        overdue = [each for each, since_s in passed_s.items() if now_s >= since_s + 1.0]
        num_overdue += bool(overdue)
        assert not overdue or submit.request == overdue[0]
        passed_s.pop(submit.request, None)

    policies = replace(make_policies(PLAIN), clustering=Noting(max_adapters=4, max_wait_s=1.0))
    trace = make_trace(TraceSpec(requests=1000, adapters=200, rate=60.0))
    simulation = Simulation(setting(max_running=16), trace, policies=policies, on_submit=check_sent)
    assert all(record.ok for record in checked(simulation))
    assert num_overdue > 100
    assert not passed_s


def test_the_engine_is_simulated_as_it_was_measured() -> None:
    rows = h200.compare()
    assert len(rows) >= 3
    for row in rows:
        assert abs(row.error) < 0.1
        assert row.simulated_steps == pytest.approx(row.measured_steps, rel=0.02)
        assert row.simulated_loads == pytest.approx(row.measured_loads, abs=2)
