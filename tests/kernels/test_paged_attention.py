from dataclasses import replace

import numpy as np
import pytest
import torch

from lorry.kernels.attention_plan import AttentionSetting, allocate_attention_work, plan_attention
from lorry.kernels.page_layout import PAGE_TOKENS, PageLayout
from tests.support.kernel_cases import DTYPES, geometry, store_sequences
from tests.support.kernel_checks import attend, check_attention

SETTING = AttentionSetting(
    block_rows=16,
    block_tokens=16,
    programs_per_multiprocessor=3,
    unit_cost=1,
    min_share=2,
    num_warps=4,
    num_stages=1,
)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "group of 7": (7, 1), "one group": (16, 1)}
LENGTHS = {
    "one token": [(1, 1)],
    "page ends": [(15, 1), (16, 1), (17, 1)],
    "ragged decodes": [(1, 1), (150, 1), (33, 1), (64, 1)],
    "one long sequence over all programs": [(400, 1)],
    "prompt from nothing": [(37, 37)],
    "chunks with a past, and decodes": [(40, 7), (90, 1), (53, 20), (16, 16)],
}


def layout(heads: int, kv_heads: int, dtype: torch.dtype) -> PageLayout:
    return PageLayout(geometry=geometry(64, heads, kv_heads, 32, 64), dtype=DTYPES[dtype])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_attention_matches_the_reference(device, lengths, heads):
    query_heads, kv_heads = HEADS[heads]
    sequences = store_sequences(
        LENGTHS[lengths], layout(query_heads, kv_heads, torch.float32), device, padding=2
    )
    check_attention(sequences, query_heads, SETTING)


@pytest.mark.parametrize("heads", HEADS)
def test_attention_in_half_precision_matches_the_reference(device, heads):
    query_heads, kv_heads = HEADS[heads]
    sequences = store_sequences(
        [(70, 1), (21, 5)], layout(query_heads, kv_heads, torch.float16), device
    )
    check_attention(sequences, query_heads, SETTING)


def test_a_tile_that_is_not_full_reads_what_its_own_rows_see(device):
    sequences = store_sequences([(40, 20), (300, 1)], layout(2, 2, torch.float32), device)
    check_attention(sequences, 2, SETTING)


# Of one token, within a block, of whole blocks, over pages, and larger than any context here.
WINDOWS = [1, 5, 16, 33, 1000]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_in_a_window_matches_the_reference(device, lengths, window):
    sequences = store_sequences(LENGTHS[lengths], layout(4, 2, torch.float32), device, padding=2)
    check_attention(sequences, 4, SETTING, window)


def test_attention_in_a_window_as_large_as_the_context_is_that_without(device):
    sequences = store_sequences(LENGTHS["ragged decodes"], layout(4, 2, torch.float32), device)
    q_TQD = torch.randn(len(sequences.sequence_T), 4, 32)
    whole = attend(sequences, q_TQD, SETTING)
    assert torch.equal(attend(sequences, q_TQD, SETTING, 150), whole)
    assert not torch.equal(attend(sequences, q_TQD, SETTING, 149), whole)


@pytest.mark.parametrize(("chunk", "window"), [(1, 32), (17, 16), (7, 30), (40, 30)])
def test_blocks_below_the_window_are_neither_read_nor_paid_for(device, chunk, window):
    """Their pages hold NaN, and a plan for any context costs what one for the window does.

    The first two windows begin where a block does.
    """
    tokens = 400
    sequences = store_sequences([(tokens, chunk)], layout(4, 2, torch.float32), device)
    kv = sequences.pool.slices.view(-1, 2, *sequences.pool.kv_shape)
    first_seen = tokens - chunk - window + 1
    for page in sequences.block_table_SP[0, : first_seen // PAGE_TOKENS].tolist():
        kv[page] = torch.nan
    check_attention(sequences, 4, SETTING, window)
    assert planned_cost(400, chunk, window) == planned_cost(400 + 160, chunk, window)
    assert planned_cost(400, chunk, None) < planned_cost(400 + 160, chunk, None)


def planned_cost(tokens: int, chunk: int, window: int | None) -> int:
    device = torch.device("cpu")
    work = allocate_attention_work(
        SETTING, max_rows=64, heads=4, kv_heads=2, head_dim=32, device=device, window=window
    )
    position = torch.arange(tokens - chunk, tokens, dtype=torch.int32)
    plan_attention(torch.zeros(chunk, dtype=torch.int32), position, work)
    return int(work.program_P4[:, 3].sum())


@pytest.mark.parametrize("unit_cost", [0, 3])
def test_shares_cover_every_block_of_every_unit_once(device, unit_cost):
    setting = replace(SETTING, unit_cost=unit_cost)
    kv_heads, tokens = 2, [5, 300, 17, 64, 1]
    work = allocate_attention_work(
        setting, max_rows=16, heads=4, kv_heads=kv_heads, head_dim=32, device=device
    )
    sequence = torch.arange(len(tokens), dtype=torch.int32)
    plan_attention(sequence, torch.tensor(tokens, dtype=torch.int32) - 1, work)
    blocks = -(-np.array(tokens) // setting.block_tokens)
    costs = np.repeat(blocks + setting.unit_cost, kv_heads)
    starts = np.cumsum(costs) - costs
    next_cost = 0
    for tile, kv_head, before, cost in work.program_P4.tolist():
        if cost:
            assert starts[tile * kv_heads + kv_head] + before == next_cost
            next_cost += cost
    assert next_cost == costs.sum()
    assert work.tile_N8[: len(tokens), 5].tolist() == blocks.tolist()


def test_plans_split_short_runs_from_long_ones(device):
    short, long = (
        allocate_attention_work(
            SETTING, max_rows=32, heads=4, kv_heads=2, head_dim=32, device=device
        )
        for _ in range(2)
    )
    sequence = torch.tensor([0, *[1] * 8, *[2] * 9, 3, -1], dtype=torch.int32)
    position = torch.tensor([9, *range(8), *range(9), 40, 0], dtype=torch.int32)
    plan_attention(sequence, position, short, max_run=short.tile_rows)
    plan_attention(sequence, position, long, min_run=long.tile_rows + 1)
    first_row, rows = 0, 1
    assert short.tile_N8[:3, [first_row, rows]].tolist() == [[0, 1], [1, 8], [18, 1]]
    assert long.tile_N8[:3, [first_row, rows]].tolist() == [[9, 8], [17, 1], [0, 0]]


def test_a_step_larger_than_the_work_list_is_refused(device):
    work = allocate_attention_work(
        SETTING, max_rows=4, heads=4, kv_heads=2, head_dim=32, device=device
    )
    row = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(ValueError, match="5 rows exceed the 4"):
        plan_attention(row, row, work)
