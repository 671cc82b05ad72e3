"""Truncated sampling and logprobs: the kernels against their references."""

import pytest
import torch

from lorry.kernels.logprobs import (
    MAX_TOP,
    NOT_ASKED,
    logprobs_reference,
    packed_logprobs,
    rank,
    unpacked,
    write_logprobs,
)
from lorry.kernels.sampling import sample, sample_reference
from lorry.kernels.truncation import BLOCK_V, truncate, truncation_reference
from tests.support.sampling_cases import (
    Truncation,
    check_logprobs,
    check_rows_of_nans,
    check_truncation,
    mixed_logits,
    mixed_num_top,
    mixed_truncation,
    report_logprobs,
)
from tests.support.warped_draws import warped

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERYTHING = -torch.inf


def rows_of(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, rows: int = 1) -> Truncation:
    values = (temperature, top_k, top_p, min_p)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    return Truncation(
        *(torch.full((rows,), value, dtype=d) for value, d in zip(values, dtypes, strict=True))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(40, 100), (12, 5003), (3, 20_000)])
def test_truncation_matches_the_reference(device, dtype, rows, vocabulary):
    logits = mixed_logits(rows, vocabulary, dtype, device)
    check_truncation(logits, mixed_truncation(rows, device, seed=vocabulary))


@pytest.mark.parametrize("top_k", [1, 3, BLOCK_V + 1, 19_990])
def test_top_k_keeps_exactly_k_distinct_logits(device, top_k):
    """The row is longer than the room for candidates, so the largest k read it whole."""
    logits = torch.randperm(20_000, generator=torch.Generator().manual_seed(1)).float()[None]
    threshold = truncate(logits - 10_000, *rows_of(top_k=top_k))
    assert int((logits - 10_000 >= threshold).sum()) == top_k


def test_a_k_above_the_number_of_lanes_reaches_what_every_lane_has_larger_ones_than(device):
    logits = torch.arange(2 * BLOCK_V, 0, -1).float()[None]
    assert truncate(logits, *rows_of(top_k=BLOCK_V)).tolist() == [BLOCK_V + 1]
    assert truncate(logits, *rows_of(top_k=BLOCK_V + 1)).tolist() == [BLOCK_V]


def test_equal_logits_are_kept_or_left_out_together(device):
    logits = torch.tensor([[3.0, 1, 2, 2, 2, 1, 0, -1]])
    assert truncate(logits, *rows_of(top_k=2)).tolist() == [2]
    assert truncate(logits, *rows_of(top_k=4)).tolist() == [2]
    assert truncate(logits, *rows_of(top_k=5)).tolist() == [1]
    above = logits.softmax(dim=1)[0]
    assert truncate(logits, *rows_of(top_p=float(above[0]) + 1e-3)).tolist() == [2]
    assert truncate(logits, *rows_of(top_p=float(above[0]) - 1e-3)).tolist() == [3]


def test_many_equal_logits_leave_no_room_for_candidates(device):
    logits = torch.zeros(1, 20_000)
    logits[0, 17] = 1
    assert truncate(logits, *rows_of(top_k=2)).tolist() == [0]
    assert truncate(logits, *rows_of(top_k=1)).tolist() == [1]
    assert truncate(logits, *rows_of(top_p=0.5)).tolist() == [0]
    assert truncate(logits, *rows_of(top_p=1e-5)).tolist() == [1]


def test_top_p_measures_what_top_k_leaves(device):
    logits = torch.tensor([[4.0, 3, 2, 1, 0]]).log()
    assert float(truncate(logits[:, :4], *rows_of(top_p=0.65)).exp()) == pytest.approx(3)
    alone = truncate(logits[:, :4], *rows_of(top_p=0.75))
    assert float(alone.exp()) == pytest.approx(2)
    after_top_k = truncate(logits[:, :4], *rows_of(top_p=0.75, top_k=3))
    assert float(after_top_k.exp()) == pytest.approx(3)


def test_rows_without_truncation_and_greedy_rows_keep_everything(device):
    logits = torch.randn(2, 300)
    assert truncate(logits, *rows_of(rows=2)).tolist() == [EVERYTHING] * 2
    greedy = rows_of(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, rows=2)
    assert truncate(logits, *greedy).tolist() == [EVERYTHING] * 2
    assert truncation_reference(logits, *greedy).tolist() == [EVERYTHING] * 2


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (40, 0.7, 0.0), (30, 0.9, 0.2), (1, 0.5, 0.5)],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_reference_keeps_what_the_warpers_of_transformers_keep(
    temperature, top_k, top_p, min_p
):
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(30, 400, generator=generator) * 3
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = rows_of(temperature, top_k, top_p, min_p, rows=30)
    kept = logits >= truncation_reference(logits, *rows)[:, None]
    assert torch.equal(kept, warped(logits, sampling) > -torch.inf)


@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_truncated_samples_equal_the_references(device, vocabulary):
    logits = mixed_logits(20, vocabulary, torch.float32, device)
    rows = mixed_truncation(20, device)
    threshold = truncation_reference(logits, *rows)
    seed, position = torch.arange(20) * 7919 - 3, torch.arange(20)
    token = torch.full((20,), -1)
    sample(logits, rows.temperature_T, seed, position, token, threshold)
    expected = sample_reference(logits, rows.temperature_T, seed, position, threshold)
    assert token.tolist() == expected.tolist()
    assert (logits.gather(1, token[:, None])[:, 0] >= threshold).all()
    free = sample_reference(logits, rows.temperature_T, seed, position)
    assert token.tolist() != free.tolist()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaNs, in the interpreter
def test_rows_of_nans_draw_a_token_and_disturb_no_others(device):
    check_rows_of_nans(device)


@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "cut", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.5}]
)
def test_the_reference_draws_a_token_whatever_the_logits(logit, cut):
    logits = torch.randn(4, 100)
    logits[0] = logit
    logits[1, 3] = logit
    logits[2, 1:] = logit
    rows, number = rows_of(rows=4, **cut), torch.arange(4)
    threshold = truncation_reference(logits, *rows)
    token = sample_reference(logits, rows.temperature_T, number, number, threshold)
    assert ((token >= 0) & (token < 100)).all()
    if logit == torch.inf:
        assert (logits[torch.arange(3), token[:3]] == torch.inf).all()
    else:
        assert not (logits[torch.arange(1, 4), token[1:]] == logit).any()
        assert not logits[torch.arange(1, 4), token[1:]].isnan().any()


def test_a_threshold_of_nothing_changes_no_draw(device):
    logits, row = torch.randn(16, 3000), torch.arange(16)
    plain, kept = torch.full((16,), -1), torch.full((16,), -2)
    temperature = torch.linspace(0, 2, 16)
    sample(logits, temperature, row, row, plain)
    sample(logits, temperature, row, row, kept, torch.full((16,), EVERYTHING))
    assert plain.tolist() == kept.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [20, 2048, 5003])
def test_logprobs_match_the_reference(device, dtype, vocabulary):
    logits = mixed_logits(10, vocabulary, dtype, device)[:, 1:]
    token = torch.arange(10)
    check_logprobs(logits, token, mixed_num_top(10, device).clamp(max=vocabulary - 1))


def test_equal_logprobs_come_in_the_order_of_their_ids(device):
    logits = torch.zeros(1, 6000)
    logits[0, [5, 2047, 2048, 5999]] = 1
    token, num_top = torch.tensor([3]), torch.tensor([6], dtype=torch.int32)
    for logprobs in (
        report_logprobs(logits, token, num_top),
        logprobs_reference(logits, token, num_top),
    ):
        assert logprobs.top_id_TX[0, :6].tolist() == [5, 2047, 2048, 5999, 0, 1]


def test_logprobs_are_those_of_the_logits_before_they_were_changed(device):
    logits = torch.randn(1, 4000)
    expected = logits.log_softmax(dim=1)
    num_top = torch.tensor([3], dtype=torch.int32)
    out = unpacked(packed_logprobs(1, device))
    ranked = rank(logits, num_top)
    best = int(logits.argmax())
    logits[0, best] = -torch.inf
    token = logits.argmax(dim=1)
    write_logprobs(logits, ranked, token, num_top, out)
    assert out.top_id_TX[0, :2].tolist() == [best, int(token)]
    assert float(out.chosen_T) == pytest.approx(float(expected[0, token]), abs=1e-5)


def test_rows_that_ask_for_no_logprobs_are_not_written(device):
    num_top = torch.tensor([NOT_ASKED, 0], dtype=torch.int32)
    out = report_logprobs(torch.randn(2, 100), torch.tensor([1, 2]), num_top)
    assert out.chosen_T.tolist()[0] == 0
    assert out.chosen_T.tolist()[1] < 0
    assert out.top_id_TX.shape == (2, MAX_TOP)
    assert not out.top_id_TX.any()
