import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import roofline
from benchmarks.roofline import MODELS, gemm_ms, ideal_seconds
from benchmarks.trace import NO_ADAPTER, make_trace


def test_a_trace_is_the_same_every_time() -> None:
    trace = make_trace(requests=50, adapters=8)
    assert trace == make_trace(requests=50, adapters=8)
    assert trace != make_trace(requests=50, adapters=8, seed=43)


def test_lengths_do_not_depend_on_the_number_of_adapters() -> None:
    few, many = (make_trace(requests=50, adapters=adapters) for adapters in (0, 1000))
    assert [r.prompt_tokens for r in few] == [r.prompt_tokens for r in many]
    assert [r.output_tokens for r in few] == [r.output_tokens for r in many]
    assert {r.adapter for r in few} == {NO_ADAPTER}


def test_popularity_follows_alpha() -> None:
    zipf = np.bincount([r.adapter for r in make_trace(requests=5000, adapters=100)])
    assert 0.15 < zipf[0] / 5000 < 0.25  # 1 / H(100) is 0.193
    flat = np.bincount([r.adapter for r in make_trace(requests=5000, adapters=100, alpha=0)])
    assert flat.max() < 100


def test_arrivals_have_the_asked_rate() -> None:
    last = make_trace(requests=4000, adapters=1, rate=5.0, cv=4.0)[-1].arrival_s
    assert last == pytest.approx(800, rel=0.3)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_ideal_products_grow_with_the_rows(model: str) -> None:
    times = [gemm_ms(MODELS[model], rows, rows) for rows in (1, 100, 300, 512, 600, 4096)]
    assert times == sorted(times)


def test_ideal_engine_pays_for_each_distinct_adapter() -> None:
    model = MODELS["llama-3-8b"]
    seconds = [
        ideal_seconds(model, make_trace(requests=200, adapters=adapters), [rank])
        for adapters, rank in ((0, 16), (1, 16), (100, 16), (100, 64))
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


def test_large_steps_cost_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {"body_ms": {"512": 13.0, "576": 17.0, "1024": 31.0}, "head_ms": {"1": 1.0, "65": 3.0}}
    path = tmp_path / "products.json"
    path.write_text(json.dumps({"metrics": {"llama-3-8b": times}}))
    monkeypatch.setattr(roofline, "PRODUCTS", path)
    model = MODELS["llama-3-8b"]
    assert gemm_ms(model, 544, 33) == 15.0 + 2.0
    assert gemm_ms(model, 2048, 1) == 62.0 + 1.0
    assert gemm_ms(model, 512, 1) == model.gemm_ms[512]
