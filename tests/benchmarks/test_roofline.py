import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.card import Card, find_card
from benchmarks.roofline import MODELS, ideal_model, ideal_seconds
from lorry.client.bench.trace import TraceSpec, make_trace


def h200() -> Card:
    card = find_card("NVIDIA H200")
    assert card is not None
    return card


@pytest.mark.parametrize("model", sorted(MODELS.keys() & h200().products))
def test_ideal_products_grow_with_the_rows(model: str) -> None:
    products = h200().products[model]
    times = [products.ms(rows, rows) for rows in (64, 128, 320, 512, 640, 4096)]
    assert times == sorted(times)


def test_ideal_engine_pays_for_each_distinct_adapter_and_for_a_small_pool() -> None:
    def seconds(adapters: int, rank: int, pool_gib: int = 108) -> float:
        trace = make_trace(TraceSpec(requests=200, adapters=adapters))
        model = MODELS["llama-3-8b"]
        return ideal_seconds(h200(), model, trace, [rank], pool_bytes=pool_gib << 30)

    growing = [seconds(0, 16), seconds(1, 16), seconds(100, 16), seconds(100, 64)]
    assert growing == sorted(growing)
    assert seconds(0, 16) < seconds(100, 64) < seconds(100, 64, pool_gib=6)


def test_an_ideal_engine_that_waits_for_requests_ends_after_the_last_has_come() -> None:
    trace = make_trace(TraceSpec(requests=50, adapters=5, rate=2.0))
    run = partial(ideal_seconds, h200(), MODELS["llama-3-8b"], trace, [16], pool_bytes=1 << 36)
    assert run() < trace[-1].arrival_s < run(at_arrivals=True) < trace[-1].arrival_s + run()


def test_a_model_has_an_ideal_where_its_products_were_measured() -> None:
    assert ideal_model(h200(), "llama-3-8b") is MODELS["llama-3-8b"]
    assert ideal_model(h200(), "another") is None
    assert ideal_model(None, "llama-3-8b") is None


def test_a_card_is_known_by_its_own_last_products_and_copies(tmp_path: Path) -> None:
    def write(name: str, device: str, metrics: dict[str, object], *, date: str = "2026") -> None:
        benchmark = name.partition("-")[0]
        result = {"benchmark": benchmark, "device": device, "date": date, "metrics": metrics}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    times = {"body_ms": {"512": 13.0, "576": 17.0, "1024": 31.0}, "head_ms": {"1": 1.0, "65": 3.0}}
    old = {"body_ms": {"1": 1.0}, "head_ms": {"1": 1.0}}
    write("products-old", "mine", {"llama": old}, date="2025")
    write("products-new", "mine", {"llama": times})
    write("kernels-theirs", "theirs", {"copy_bytes_per_s": 9.0})
    directories = (tmp_path,)
    assert find_card("mine", directories) is None
    find_card.cache_clear()
    write("kernels-mine", "mine", {"copy_bytes_per_s": 2.0})
    card = find_card("mine", directories)
    assert card is not None
    assert card.bytes_per_s == 2.0
    assert card.products["llama"].ms(544, 33) == 15.0 + 2.0
    assert card.products["llama"].ms(2048, 1) == 62.0 + 1.0
