"""What the measurements of live services are told by."""

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import figures
from benchmarks.prediction_error import BUCKETS, PredictionError
from benchmarks.served import tokenized_model
from lorry.router.tokenizer import Tokenizer
from tests.support.scrape import Scrape

FAMILY = BUCKETS.removesuffix("_bucket")


def scrape(**counts: int) -> Scrape:
    """Counts up to 0.1, 0.2, 0.5 and any error, of predictions at arrival; others at the submit."""
    bounds = zip(("0.1", "0.2", "0.5", "+Inf"), counts.values(), strict=True)
    lines = [f'{BUCKETS}{{at="arrival",le="{le}"}} {count}' for le, count in bounds]
    lines += [f'{BUCKETS}{{at="submit",le="{le}"}} 7' for le in ("0.1", "0.2", "0.5", "+Inf")]
    return Scrape("\n".join([f"# TYPE {FAMILY} histogram", *lines, ""]))


def test_the_prediction_error_is_that_of_the_requests_in_between() -> None:
    before, after = scrape(a=2, b=4, c=8, d=10), scrape(a=2, b=8, c=16, d=20)
    error = PredictionError.between(before, after)
    assert error.metrics() == {
        "requests": 10,
        "median": 0.275,  # 4 up to 0.2 and 8 up to 0.5: a quarter of the way
        "within_0.2": 0.4,
        "within_0.5": 0.8,
    }
    assert PredictionError.between(before, before).metrics()["median"] == 0.0


def test_a_model_without_a_tokenizer_gets_one_that_the_router_can_use(tmp_path: Path) -> None:
    model = tokenized_model("llama-2-7b", tmp_path)
    tokenizer = Tokenizer.read(model, num_threads=1)
    try:
        assert len(tokenizer.table.texts) == 32000
        assert tokenizer.table.texts[17] == " w17"
    finally:
        tokenizer.close()


def test_readme_tells_of_loads_and_tiers(tmp_path: Path) -> None:
    some, shares = {"p50": 0.04, "p99": 0.2}, {"median": 0.1}
    load: dict[str, Any] = {
        "load": 0.8,
        "attainment": 1.0,
        "attainment_of_admitted": 1.0,
        "aborted": 0.0,
    }
    load |= {"goodput_req_per_s": 20.0, "abort_wait_s": None, "ttft_s": some, "tpot_s": some}
    load |= {"ttft_prediction_error": shares}
    config = {"model": "llama-3-8b", "adapters": 1000, "rank": 16, "alpha": 1.0}
    config |= {"prompt_tokens": "8-1024", "output_tokens": "8-256"}
    config |= {"slo_ttft_s": 1.0, "slo_tpot_s": 0.1}
    live = {"capacity_req_per_s": 25.0, "alone_ttft_s": 0.03, "loads": [load]}
    one = {"median": 12.3, "min": 9.0, "max": 20.0}
    tiers = {
        "memory": {"later_ms": one, "warm_ms": one},
        "redis": {"later_ms": one, "warm_ms": one},
    }
    row = {"device": "a GPU", "date": "2026-01-02", "command": "it", "config": config}
    for name, metrics in {"live": live, "cold_tiers": tiers}.items():
        text = json.dumps(row | {"benchmark": name, "metrics": metrics})
        (tmp_path / f"{name}.json").write_text(text)
    text = figures(tmp_path)
    assert "0.8: attainment 100.0% (100.0% of admitted), goodput 20.0/s, aborted 0.0%, " in text
    assert "first token 40 ms (p99 200)" in text
    assert "12.3 (9.0 to 20.0) ms where it lies in a Redis" in text
