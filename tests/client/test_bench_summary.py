import pytest

from lorry.client.bench.record import Record, Slo
from lorry.client.bench.report import report
from lorry.client.bench.summary import summary
from lorry.client.bench.trace import TraceRequest

SLO = Slo(ttft_s=2.0, tpot_s=0.1)


def served(
    arrival_s: float, ttft_s: float, tpot_s: float = 0.05, *, tokens: int = 11, tenant: str = "a"
) -> Record:
    first_s = arrival_s + ttft_s
    last_s = first_s + tpot_s * (tokens - 1)
    return Record(
        0,
        TraceRequest(arrival_s, 0, 100, tokens, tenant),
        SLO,
        sent_s=arrival_s + 0.5,
        first_token_s=first_s,
        last_token_s=last_s,
        output_tokens=tokens,
        ended_s=last_s,
        code="OK",
    )


def refused(arrival_s: float, tenant: str = "a") -> Record:
    planned = TraceRequest(arrival_s, 0, 100, 11, tenant)
    return Record(
        1,
        planned,
        SLO,
        sent_s=arrival_s,
        ended_s=arrival_s + 0.1,
        code="RESOURCE_EXHAUSTED",
        reason="QUEUE_FULL",
    )


def test_times_count_from_the_planned_arrival() -> None:
    record = served(10.0, 1.0)
    assert record.ttft_s == 1.0
    assert record.latency_s == pytest.approx(1.5)
    assert record.send_delay_s == 0.5
    assert record.tpot_s == pytest.approx(0.05)


def test_a_request_of_one_token_has_no_time_per_token_and_can_meet_its_slo() -> None:
    record = served(0.0, 1.0, tokens=1)
    assert record.tpot_s is None
    assert record.met_slo


def test_what_is_late_slow_or_refused_misses_its_slo() -> None:
    records = [served(0.0, 1.0), served(0.0, 2.5), served(0.0, 1.0, tpot_s=0.2), refused(9.0)]
    assert [record.met_slo for record in records] == [True, False, False, False]
    figures = summary(records)
    assert figures["attainment"] == 0.25
    assert figures["attainment_of_admitted"] == pytest.approx(1 / 3)
    assert figures["goodput_req_per_s"] == pytest.approx(1 / 9.1)
    assert figures["satisfaction"] == pytest.approx((0.75 + 0.0 + 0.75 + 0.0) / 4)
    assert figures["errors"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 1}
    assert figures["ttft_s"]["p50"] == 1.0


def test_an_output_that_was_cut_off_misses_its_slo() -> None:
    record = served(0.0, 1.0)
    record.code, record.reason = "ABORTED", "WORKER_LOST"
    assert not record.met_slo
    assert record.satisfaction == 0.0


def test_fairness_is_of_the_service_by_weight() -> None:
    records = [served(0.0, 1.0, tenant="a")] + [served(0.0, 1.0, tenant="b") for _ in range(3)]
    assert summary(records)["fairness"] == pytest.approx(0.8)
    assert summary(records, weights={"a": 1.0, "b": 3.0})["fairness"] == pytest.approx(1.0)
    assert summary(records)["tenants"]["b"]["service_tokens"] == 3 * (100 + 2 * 11)


def test_a_run_without_any_answer_has_figures() -> None:
    figures = summary([refused(0.0), refused(1.0)])
    assert figures["ttft_s"] is None
    assert figures["goodput_req_per_s"] == 0


def test_a_report_is_one_page_that_shows_names_as_text() -> None:
    records = [served(0.0, 1.0, tenant="<b>"), refused(1.0, tenant="b")]
    result = {"date": "today", "device": "here", "command": "lorry bench <x>", "config": {"a": 1}}
    page = report(result | {"metrics": summary(records)}, records)
    assert "lorry bench &lt;x&gt;" in page
    assert page.count("<svg") == 5
    assert "RESOURCE_EXHAUSTED QUEUE_FULL" in page
    assert "<b>" not in page.split("<h2>Tenants</h2>")[1].split("</table>")[0]
    assert "http" not in page.split("<svg")[0]
