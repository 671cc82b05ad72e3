"""The bound of what can be served in time, against every choice of whom to serve."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.bound import best_filling, demands_of, most_within_slo, work_of
from benchmarks.simulation.clairvoyant import serve_only
from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.run import Setting, Simulation
from benchmarks.simulation.worker import PAGE_TOKENS, WorkerLimits
from lorry.client.bench.record import Slo
from lorry.client.bench.trace import TraceRequest

COSTS = LinearCosts(step_ms=30.0, row_ms=5.0, kv_token_ms=0.01, rank_ms=0.1)
SETTING = Setting(
    costs=COSTS,
    limits=WorkerLimits(pool_pages=20, page_bytes=1 << 20, step_tokens=64, fetch_s=0.0),
    bytes_per_rank=1 << 16,
    slo=Slo(ttft_s=0.4),
)


def requests_of(drawn: Sequence[tuple[int, ...]]) -> list[TraceRequest]:
    return [
        TraceRequest(tenths / 10, adapter, prompt_tokens, output_tokens)
        for tenths, adapter, prompt_tokens, output_tokens in sorted(drawn)
    ]


def in_time(trace: Sequence[TraceRequest], served: tuple[int, ...]) -> int:
    return sum(record.met_slo for record in serve_only(SETTING, trace, set(served)))


drawn_requests = st.tuples(
    st.integers(0, 4), st.integers(0, 2), st.integers(1, 60), st.integers(1, 12)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(drawn_requests, min_size=1, max_size=5))
def test_no_choice_of_whom_to_serve_beats_it(drawn: list[tuple[int, ...]]) -> None:
    trace = requests_of(drawn)
    bound = most_within_slo(SETTING, COSTS, trace)
    for count in range(bound + 1, len(trace) + 1):
        assert all(
            in_time(trace, chosen) < count for chosen in combinations(range(len(trace)), count)
        )


def test_it_is_all_of_them_while_there_is_time_and_fewer_under_overload() -> None:
    found = {}
    for tenths in (20, 1):
        trace = requests_of([(tenths * n, n % 5, 8 + n % 40, 1 + n % 25) for n in range(100)])
        found[tenths] = most_within_slo(SETTING, COSTS, trace)
        assert sum(record.met_slo for record in Simulation(SETTING, trace).run()) <= found[tenths]
    assert found[20] == 100 > 80 > found[1]


def test_the_requests_works_are_no_more_than_their_steps_take() -> None:
    trace = requests_of([(0, adapter, 10 + adapter, 20) for adapter in (0, 0, 1, 2)])
    simulation = Simulation(SETTING, trace)
    simulation.run()
    work_s = work_of(demands_of(SETTING, trace), COSTS, 20 * PAGE_TOKENS).sum()
    assert work_s < simulation.workers[0].counts.busy_s
    assert work_s > 0.3 * simulation.workers[0].counts.busy_s


@pytest.mark.parametrize(
    ("values", "sizes", "best"),
    [
        ([6.0, 10.0, 12.0], [1.0, 2.0, 3.0], 24.0),  # the last one cut to two thirds
        ([1.0], [100.0], 0.05),
        ([3.0, 4.0], [1.0, 1.0], 7.0),
        ([], [], 0.0),
    ],
)
def test_a_pool_is_filled_with_the_best(values: Any, sizes: Any, best: float) -> None:
    assert best_filling(np.array(values), np.array(sizes), 5.0) == pytest.approx(best)
