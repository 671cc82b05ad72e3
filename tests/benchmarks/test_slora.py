"""S-LoRA's loop as modelled: its recorded runs, and what each of its policies does."""

import pytest

from benchmarks.simulation.costs import LinearCosts
from benchmarks.simulation.fit_slora import figures
from benchmarks.simulation.slora import ABORT_WAIT_S, SLora, SLoraSetting
from benchmarks.simulation.slora_recorded import A10G_S2, CVS, POLICIES, recorded_trace
from benchmarks.studies.slora import own_loop
from lorry.client.bench.trace import TraceRequest

SETTING = SLoraSetting(
    costs=LinearCosts(step_ms=100.0, row_ms=0.0, kv_token_ms=0.0, rank_ms=0.0),
    pool_tokens=600,
    ranks=(8,),
    load_s_per_rank=0.0,
)


@pytest.mark.parametrize("policy", POLICIES[A10G_S2])
@pytest.mark.parametrize("cv", [1, 8])
def test_recorded_attainments_are_met_within_a_tenth(policy: str, cv: int) -> None:
    trace = recorded_trace(A10G_S2.adapters, A10G_S2.rate, cv=cv)
    recorded = POLICIES[A10G_S2][policy]["attainment"][CVS.index(cv)]
    assert own_loop(A10G_S2, policy, trace)["attainment"] == pytest.approx(recorded, abs=0.1)


def test_requests_that_do_not_fit_by_their_asked_output_wait() -> None:
    trace = [TraceRequest(0.0, 0, 100, 400), TraceRequest(0.0, 0, 100, 400)]
    first, second = SLora(SETTING, "fcfs").run(trace)
    assert first.first_token_s == pytest.approx(0.1)
    assert second.first_token_s is not None
    assert first.ended_s is not None
    assert second.first_token_s > first.ended_s


def test_the_newest_go_first_by_lcfs() -> None:
    trace = [TraceRequest(0.01 * n, 0, 100, 400) for n in range(4)]
    records = SLora(SETTING, "lcfs").run(trace)
    order = sorted(range(4), key=lambda index: records[index].first_token_s or 0.0)
    assert order == [0, 3, 2, 1]


def test_early_abort_drops_who_has_waited_too_long() -> None:
    trace = [TraceRequest(0.0, 0, 100, 400) for _ in range(3)]
    records = SLora(SETTING, "abort").run(trace)
    aborted = [record for record in records if not record.ok]
    assert len(aborted) == 2
    assert all((record.latency_s or 0.0) >= ABORT_WAIT_S for record in aborted)
    assert figures(records)["attainment"] == pytest.approx(1 / 3)
