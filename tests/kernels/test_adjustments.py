"""Penalties, biases and bans: the kernels against their reference, and it against others."""

import pytest
import torch

from lorry.kernels.adjustments import Adjustments, SequenceTables, adjust, count_drawn
from tests.support.adjusted_draws import adjusted
from tests.support.adjustment_cases import check_adjustments, mixed_adjustments, mixed_tables
from tests.support.sampling_cases import mixed_logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PROMPT, OUTPUT = [3, 3, 4, 9], [4, 5, 5, 5, 11]
FIELDS = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 0.75},
    {"frequency_penalty": 0.25},
    {"frequency_penalty": -0.25, "presence_penalty": -2.0},
    {"logit_bias": {4: 1.5, 6: -100.0, 0: 3.0}},
    {"stop_token_ids": [5, 7], "min_tokens": 6},
    {"stop_token_ids": [5, 7], "min_tokens": 5},
    {"stop_token_ids": [5, 7], "min_tokens": 6, "logit_bias": {5: 100.0}},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.1,
        "logit_bias": {4: 1.5},
    },
    {},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(20, 400), (7, 5003)])
def test_adjustments_match_the_reference(device, dtype, rows, vocabulary):
    logits = mixed_logits(rows, vocabulary, dtype, device)
    tables = mixed_tables(rows, vocabulary, device)
    for seed in range(3):
        check_adjustments(logits, tables, mixed_adjustments(rows, device, seed))


def one_row(fields) -> tuple[SequenceTables, Adjustments]:
    """The tables of a sequence whose tokens are PROMPT and OUTPUT, in row 1 of 3."""
    count = torch.zeros(3, 400, dtype=torch.int32)
    count[1, PROMPT] = 1
    bias_id, bias = torch.zeros(3, 300, dtype=torch.int32), torch.zeros(3, 300)
    banned = torch.zeros(3, 128, dtype=torch.int32)
    biases = fields.get("logit_bias", {})
    bias_id[1, : len(biases)] = torch.tensor(list(biases), dtype=torch.int32)
    bias[1, : len(biases)] = torch.tensor(list(biases.values()))
    stop = fields.get("stop_token_ids", [])
    banned[1, : len(stop)] = torch.tensor(stop, dtype=torch.int32)
    is_early = len(OUTPUT) < fields.get("min_tokens", 0)
    row = Adjustments(
        torch.tensor([1]),
        torch.tensor([fields.get("repetition_penalty", 1.0)]),
        torch.tensor([fields.get("presence_penalty", 0.0)]),
        torch.tensor([fields.get("frequency_penalty", 0.0)]),
        torch.tensor([len(biases)], dtype=torch.int32),
        torch.tensor([len(stop) if is_early else 0], dtype=torch.int32),
    )
    return SequenceTables(count, bias_id, bias, banned), row


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields) or "none")
def test_what_is_left_is_what_the_processors_of_transformers_leave(device, fields):
    torch.manual_seed(1)
    logits = torch.randn(len(OUTPUT) + 1, 400) * 3
    tables, row = one_row(fields)
    for token in OUTPUT:
        count_drawn(tables, row, torch.tensor([token]))
    actual = check_adjustments(logits[-1:], tables, row)
    expected = adjusted(logits, fields, PROMPT, [*OUTPUT, 0])[-1:]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert tables.count_RV[[0, 2]].eq(0).all()


def test_rows_without_penalties_count_nothing(device):
    tables, row = one_row({"logit_bias": {5: 1.0}})
    before = tables.count_RV.clone()
    count_drawn(tables, row, torch.tensor([5]))
    assert torch.equal(tables.count_RV, before)


def test_a_token_that_is_banned_and_favoured_is_banned(device):
    tables, row = one_row({"logit_bias": {5: 100.0}, "stop_token_ids": [5], "min_tokens": 99})
    adjusted_row = adjust(torch.zeros(1, 400), tables, row)
    assert adjusted_row[0, 5] == -torch.inf
    assert (adjusted_row[0].isinf()).sum() == 1
