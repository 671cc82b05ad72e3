"""The ideal engine of several GPUs, from made-up measurements."""

import pytest

from benchmarks.building import CONFIGS
from benchmarks.rank_ideal import rank_card, rank_ideal, rank_model
from lorry.client.bench.trace import TraceSpec
from lorry.rpc.base_model import read_base_model

MODEL = "llama-2-13b"
ROWS = 64
PRODUCTS = {"body_ms": {str(ROWS): 10.0}, "head_ms": {str(ROWS): 1.0}}
RESULT = {
    "device": "a GPU",
    "config": {"tensor_parallel": 2},
    "metrics": {
        "copy_bytes_per_s": 4e12,
        "sums": {
            "nccl_us": {"4096": 10.0, "655360": 20.0},
            "one_shot_us": {"4096": 5.0, "655360": 30.0},
        },
        "products": {size: {MODEL: PRODUCTS} for size in ("1", "2", "4")},
    },
}


@pytest.mark.parametrize(("size", "sum_us"), [(1, 0.0), (2, 20.0), (4, 2 * 5 + 1.5 * 15)])
def test_a_step_waits_for_two_sums_of_each_layer(size: int, sum_us: float) -> None:
    """655360 bytes are 64 rows of 5120; over four GPUs the latency doubles."""
    card = rank_card(RESULT, rank_model(read_base_model(CONFIGS / MODEL), size))
    assert card is not None
    assert card.products[MODEL].ms(ROWS, ROWS) == pytest.approx(11.0 + 81 * sum_us / 1e3)


def test_a_rank_reads_its_share_of_the_cache_and_replicated_adapters() -> None:
    base_model = read_base_model(CONFIGS / MODEL)
    one, two = (rank_model(base_model, size) for size in (1, 2))
    assert two.kv_bytes * 2 == one.kv_bytes
    assert one.adapter_bytes_per_rank == 40 * 2 * 8 * 5120
    assert two.adapter_bytes_per_rank == 40 * 2 * 6 * 5120


def test_a_trace_ends_sooner_where_sums_cost_nothing() -> None:
    rates = []
    for size in (2, 1):
        ideal = rank_ideal(RESULT, MODEL, size, [16])
        assert ideal is not None
        rates.append(ideal.req_per_s(TraceSpec(requests=20), pool_bytes=50e9))
    assert 0 < rates[0] < rates[1]


def test_a_step_reads_the_adapters_of_its_sequences_in_turn() -> None:
    ideal = rank_ideal(RESULT, MODEL, 2, [8, 64])
    assert ideal is not None
    base_ms, three_ms = (ideal.step_ms(ROWS, 512, adapters) for adapters in (0, 3))
    read_ms = (8 + 64 + 8) * ideal.model.adapter_bytes_per_rank / 4e12 * 1e3
    assert three_ms - base_ms == pytest.approx(read_ms)


def test_sizes_that_were_not_measured_have_no_ideal() -> None:
    assert rank_ideal(RESULT, MODEL, 8, [16]) is None
