import pytest

from lorry.router.request import Request, RequestState
from lorry.router.slo import Slo
from lorry.router.slo_counts import MAX_LABEL_VALUES, OTHER, SloCounts
from tests.support.router_requests import request

S = RequestState
ASKED = Slo(ttft_s=2.0, tpot_s=0.1)


def finished(first_s: float, last_s: float, num_tokens: int = 11, **fields: object) -> Request:
    built = request(slo=ASKED, **fields)  # type: ignore[arg-type]
    built.output_ids += [1] * num_tokens
    built.first_token_s, built.last_token_s = first_s, last_s
    return built


def test_an_objective_takes_from_the_default_what_it_leaves_open() -> None:
    assert Slo(ttft_s=1.0).over(ASKED) == Slo(ttft_s=1.0, tpot_s=0.1)
    assert Slo().over(Slo()) == Slo()
    assert not Slo()


@pytest.mark.parametrize(
    ("first_s", "last_s", "outcome", "satisfaction"),
    [(1.0, 2.0, "met", 0.75), (2.5, 3.0, "missed", 0.0), (1.0, 2.1, "missed", 0.75)],
    ids=["in time", "late", "slow"],
)
def test_both_times_must_be_kept(
    first_s: float, last_s: float, outcome: str, satisfaction: float
) -> None:
    counts = SloCounts()
    counts.end(finished(first_s, last_s), S.FINISHED)
    assert counts.requests == {(OTHER, "", outcome): 1}
    assert counts.satisfaction[OTHER, ""] == satisfaction


def test_what_is_aborted_is_missed_and_what_a_client_gave_up_is_neither() -> None:
    counts = SloCounts(["red"])
    counts.end(request(tenant="red", slo=ASKED), S.FAILED)
    counts.end(request(tenant="red", slo=ASKED), S.CANCELLED)
    counts.end(request(tenant="red"), S.FAILED)
    assert counts.requests == {("red", "", "missed"): 1}


def test_neither_tenants_nor_labels_are_without_limit() -> None:
    counts = SloCounts(["red"], "job")
    for number in range(MAX_LABEL_VALUES + 9):
        labels = {"job": f"j{number}", "other": "x"}
        counts.end(finished(1.0, 1.0, tenant=f"t{number}", labels=labels), S.FINISHED)
    assert {tenant for tenant, _, _ in counts.requests} == {OTHER}
    assert len(counts.requests) == MAX_LABEL_VALUES + 1
    assert counts.requests[OTHER, OTHER, "met"] == 9
