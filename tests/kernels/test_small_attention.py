import pytest
import torch

from lorry.kernels.page_layout import PAGE_TOKENS, PageLayout
from lorry.kernels.small_attention import small_attention
from lorry.kernels.small_parts import SmallSetting, allocate_small_work
from tests.support.kernel_cases import DTYPES, LAYER, geometry, store_sequences
from tests.support.kernel_checks import attend_small, check_attention

SETTING = SmallSetting(
    block_rows=16,
    block_tokens=16,
    programs_per_multiprocessor=8,
    merged_parts=4,
    num_warps=4,
    num_stages=1,
)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "group of 7": (7, 1), "one group": (16, 1)}
LENGTHS = {
    "one token": [(1, 1)],
    "a page's last token": [(16, 1)],
    "one long sequence over all programs": [(400, 1)],
    "page ends": [(15, 1), (16, 1), (17, 1)],
    "ragged": [(1, 1), (390, 1), (33, 1)],
    "a prompt's end": [(40, 4)],
    "a chunk beside a decode": [(90, 1), (53, 2)],
}


def layout(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> PageLayout:
    return PageLayout(geometry=geometry(64, heads, kv_heads, 32, 64), dtype=DTYPES[dtype])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_matches_the_reference(device, lengths):
    rows = sum(new for _, new in LENGTHS[lengths])
    sequences = store_sequences(LENGTHS[lengths], layout(4, 2), device, padding=4 - rows)
    check_attention(sequences, 4, SETTING)


@pytest.mark.parametrize("lengths", ["one long sequence over all programs", "a prompt's end"])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_of_any_heads_matches_the_reference(device, lengths, heads):
    rows = sum(new for _, new in LENGTHS[lengths])
    sequences = store_sequences(LENGTHS[lengths], layout(*HEADS[heads]), device, padding=4 - rows)
    check_attention(sequences, HEADS[heads][0], SETTING)


def test_attention_in_half_precision_matches_the_reference(device):
    sequences = store_sequences([(70, 1), (21, 2)], layout(4, 2, torch.float16), device)
    check_attention(sequences, 4, SETTING)


@pytest.mark.parametrize("window", [1, 16, 33, 1000])
@pytest.mark.parametrize("lengths", ["ragged", "a prompt's end"])
def test_attention_in_a_window_matches_the_reference(device, lengths, window):
    sequences = store_sequences(LENGTHS[lengths], layout(4, 2), device)
    check_attention(sequences, 4, SETTING, window)


def test_blocks_below_the_window_are_not_read(device):
    sequences = store_sequences([(400, 1)], layout(4, 2), device)
    kv = sequences.pool.slices.view(-1, 2, *sequences.pool.kv_shape)
    for page in sequences.block_table_SP[0, : (400 - 30) // PAGE_TOKENS].tolist():
        kv[page] = torch.nan
    check_attention(sequences, 4, SETTING, window=30)


def test_rows_of_no_sequence_are_left_as_they_are(device):
    sequences = store_sequences([(1, 1), (300, 1)], layout(4, 2), device)
    sequences.sequence_T.fill_(-1)
    assert attend_small(sequences, torch.randn(2, 4, 32), SETTING).isnan().all()


def test_a_step_of_more_rows_than_there_is_memory_for_is_refused(device):
    sequences = store_sequences([(9, 3)], layout(4, 2), device)
    work = allocate_small_work(SETTING, max_rows=2, heads=4, kv_heads=2, head_dim=32, device=device)
    step, q = (sequences.sequence_T, sequences.position_T), torch.randn(3, 4, 32)
    with pytest.raises(ValueError, match="3 rows exceed the 2"):
        small_attention(q, sequences.pool, LAYER, sequences.block_table_SP, *step, work, q)
