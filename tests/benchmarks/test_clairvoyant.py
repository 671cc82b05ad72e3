"""Whom to serve, with hindsight: against every other choice."""

from collections.abc import Sequence
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.clairvoyant import Job, clairvoyant, most_in_time
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.run import Setting, simulate
from benchmarks.simulation.worker import WorkerLimits
from lorry.client.bench.record import Slo
from lorry.client.bench.trace import TraceSpec, make_trace

DUE_S = 5.0


def are_in_time(jobs: Sequence[Job]) -> bool:
    end_s = 0.0
    for job in jobs:
        end_s = max(end_s, job.arrival_s) + job.work_s
        if end_s > job.due_s:
            return False
    return True


def most_of_all_choices(jobs: Sequence[Job]) -> int:
    return max(
        count
        for count in range(len(jobs) + 1)
        if any(are_in_time(chosen) for chosen in combinations(jobs, count))
    )


whole = st.integers(min_value=0, max_value=10).map(float)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(whole, whole), max_size=8))
def test_no_other_choice_serves_more_jobs_in_time(drawn: list[tuple[float, float]]) -> None:
    jobs = [
        Job(i, arrival_s, work_s, arrival_s + DUE_S)
        for i, (arrival_s, work_s) in enumerate(sorted(drawn))
    ]
    served = most_in_time(jobs)
    chosen = [job for job in jobs if job.index in served]
    assert are_in_time(chosen)
    assert len(chosen) == most_of_all_choices(jobs)


def test_hindsight_meets_more_objectives_than_lorry() -> None:
    costs = LinearCosts(step_ms=30.0, row_ms=0.2, kv_token_ms=0.001, rank_ms=0.01)
    limits = WorkerLimits(pool_pages=500, page_bytes=1 << 20)
    setting = Setting(costs=costs, limits=limits, slo=Slo(ttft_s=3.0))
    trace = make_trace(TraceSpec(requests=200, adapters=20, rate=4.0, cv=1.0))
    foreseen = clairvoyant(setting, costs, trace)
    assert [record.index for record in foreseen] == list(range(200))
    met = sum(record.met_slo for record in simulate(setting, trace))
    assert met < sum(record.met_slo for record in foreseen) < 200
