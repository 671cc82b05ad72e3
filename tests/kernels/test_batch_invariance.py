"""Kernels of the batch-invariant mode: right, and to the bit whatever else is in the step."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from lorry.kernels import lora_plan
from lorry.kernels.invariant_product import ProductSetting, invariant_product
from lorry.kernels.lora_plan import allocate_lora_work, plan_lora
from lorry.kernels.page_layout import GROUPS, PageLayout
from lorry.kernels.split_plan import (
    SplitSetting,
    allocate_partials,
    allocate_split_work,
    plan_splits,
)
from tests.kernels.test_lora import SETTING as LORA_SETTING
from tests.support.kernel_cases import (
    DTYPES,
    MIXED_ADAPTERS,
    TOLERANCE,
    geometry,
    layout_of,
    relative_error,
    store_adapters,
    store_sequences,
    widths_of,
)
from tests.support.kernel_checks import (
    adapt,
    attend_splits,
    check_attention,
    check_lora,
    rows_of,
)

PRODUCT = ProductSetting(
    block_rows=16, block_outputs=32, block_inputs=32, num_warps=4, num_stages=1
)
SPLITS = SplitSetting(
    block_rows=16,
    block_tokens=16,
    split_blocks=2,
    ways=3,
    programs_per_multiprocessor=3,
    num_warps=4,
    num_stages=1,
)
LORA = replace(LORA_SETTING, has_vector_form=False)
LENGTHS = {
    "one token": [(1, 1)],
    "ends of pages, splits and turns": [(16, 1), (17, 1), (32, 1), (33, 1), (96, 1), (97, 1)],
    "prompt from nothing": [(37, 37)],
    "chunks with a past, and decodes": [(40, 7), (290, 1), (16, 16), (130, 9)],
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 32), (33, 200, 70), (16, 31, 1)])
def test_products_match_the_reference(device, shape, has_bias):
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if has_bias else None
    actual = invariant_product(x, weight, bias, PRODUCT)
    assert relative_error(actual, linear(x, weight, bias)) < TOLERANCE[torch.float32]


def test_a_row_has_one_product_wherever_it_stands(device):
    torch.manual_seed(0)
    x, weight = torch.randn(40, 200), torch.randn(70, 200)
    whole = invariant_product(x, weight, None, PRODUCT)
    for part in (slice(3, 4), slice(3, 20), slice(17, 40)):
        assert torch.equal(invariant_product(x[part], weight, None, PRODUCT), whole[part])


def layout(heads: int, kv_heads: int, dtype: torch.dtype) -> PageLayout:
    return PageLayout(geometry=geometry(64, heads, kv_heads, 32, 64), dtype=DTYPES[dtype])


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_matches_the_reference(device, lengths, window):
    sequences = store_sequences(LENGTHS[lengths], layout(4, 2, torch.float32), device, padding=2)
    check_attention(sequences, 4, SPLITS, window)


@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (20, 2)])
def test_attention_in_half_precision_matches_the_reference(device, heads):
    query_heads, kv_heads = heads
    of_heads = layout(query_heads, kv_heads, torch.float16)
    check_attention(store_sequences([(170, 1), (21, 5)], of_heads, device), query_heads, SPLITS)


@pytest.mark.parametrize("window", [None, 50])
def test_a_row_attends_to_the_bit_alike_in_any_chunk_and_crowd(device, window):
    sequences = store_sequences([(110, 9), (130, 1)], layout(4, 2, torch.float32), device)
    q_TQD = torch.randn(len(sequences.sequence_T), 4, 32)
    whole = attend_splits(sequences, q_TQD, SPLITS, window)
    for start, end in ((0, 3), (3, 9), (8, 10)):
        part = slice(start, end)
        alone = attend_splits(rows_of(sequences, part), q_TQD[part], SPLITS, window)
        assert torch.equal(alone, whole[part])


def test_work_follows_the_longest_sequence_of_the_step(device):
    partials = allocate_partials(SPLITS, max_rows=16, heads=4, head_dim=32, device=device)
    work = allocate_split_work(SPLITS, partials, kv_heads=2)

    def planned(lengths):
        sequence = torch.arange(len(lengths), dtype=torch.int32)
        plan_splits(sequence, torch.tensor(lengths, dtype=torch.int32) - 1, work)
        return work.count_2.tolist()

    assert planned([1, 32]) == [2, 1]
    assert planned([1, 33, 5]) == [3, 2]
    assert planned([1000, 3]) == [2, SPLITS.ways]
    with pytest.raises(ValueError, match="17 rows exceed the 16"):
        planned([1] * 17)


@pytest.fixture
def one_planner(monkeypatch):
    """They run one after the other here."""
    monkeypatch.setattr(lora_plan, "PLANNERS", 1)


@pytest.mark.usefixtures("one_planner")
def test_lora_in_one_form_matches_the_reference(device):
    pool, tables = store_adapters(MIXED_ADAPTERS[:-1], layout_of("tiny", torch.float32), device)
    check_lora([1, 1, -1, 2, 3, 3, 3, 3, 3, 0], pool, tables, LORA, groups=(0,))


@pytest.mark.usefixtures("one_planner")
def test_lora_of_a_row_is_the_same_to_the_bit_beside_any_others(device):
    layout = layout_of("tiny", torch.float32)
    pool, tables = store_adapters(MIXED_ADAPTERS[:-1], layout, device)
    slots = [3, -1, 2, 2, 2, 0]
    torch.manual_seed(0)
    widths = [widths_of(layout, module) for module in GROUPS[1]]
    x_TI = torch.randn(len(slots), widths[0][0])
    base = torch.randn(len(slots), sum(width for _, width in widths))

    def adapted(part: slice) -> torch.Tensor:
        work = allocate_lora_work(LORA, layout, max_rows=len(slots), device=device)
        plan_lora(torch.tensor(slots[part], dtype=torch.int32), tables, work)
        return adapt(x_TI[part], base[part], 1, pool, tables, work)

    whole = adapted(slice(None))
    for row in (2, 5):
        part = slice(row, row + 1)
        assert torch.equal(adapted(part), whole[part])
