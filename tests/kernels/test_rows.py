"""Norms, activation, rotation and sampling: kernels of one program or a few for each row."""

import pytest
import torch

from lorry.kernels.activation import swiglu, swiglu_reference
from lorry.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from lorry.kernels.sampling import sample, sample_reference
from tests.support.kernel_cases import TOLERANCE, layout_of, relative_error
from tests.support.kernel_checks import check_rotation

EPS = 1e-5
DTYPES = [torch.float32, torch.float16]


def strided(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns of a wider tensor, as the outputs of a fused product are."""
    return torch.randn(rows, width + 64).to(dtype)[:, 32 : width + 32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [64, 200, 896])
def test_norms_match_the_references(device, dtype, hidden):
    torch.manual_seed(0)
    x, residual = strided(5, hidden, dtype), strided(5, hidden, dtype)
    weight = torch.randn(hidden).to(dtype)
    out = torch.full((5, hidden), torch.nan, dtype=dtype)
    rms_norm(x, weight, EPS, out)
    assert relative_error(out, rms_norm_reference(x, weight, EPS)) < TOLERANCE[dtype]
    normed, total = add_rms_norm_reference(x, residual, weight, EPS)
    add_rms_norm(x, residual, weight, EPS, out)
    assert relative_error(out, normed) < TOLERANCE[dtype]
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [320, 1500])
def test_swiglu_matches_the_reference(device, dtype, width):
    torch.manual_seed(0)
    gate, up = strided(3, width, dtype), strided(3, width, dtype)
    out = torch.full((3, width), torch.nan, dtype=dtype)
    swiglu(gate, up, out)
    assert relative_error(out, swiglu_reference(gate, up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_rotation_writes_only_the_rows_keys_and_values(device, dtype, name, has_norm):
    check_rotation(layout_of(name, dtype), device, rows=4, has_norm=has_norm)


@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_samples_equal_the_references(device, vocabulary):
    torch.manual_seed(0)
    logits = torch.randn(8, vocabulary)
    temperature = torch.tensor([0, 0.5, 1, 2, 0, 1, 1, 1])
    seed = torch.tensor([1, 2, -3, 1 << 62, 5, 6, -(1 << 63), 7])
    position = torch.arange(8)
    token = torch.full((8,), -1)
    sample(logits, temperature, seed, position, token)
    assert token.tolist() == sample_reference(logits, temperature, seed, position).tolist()


def test_a_tie_goes_to_the_smallest_id(device):
    logits = torch.zeros(1, 5000)
    logits[0, [7, 4000]] = 1
    token = torch.full((1,), -1)
    sample(logits, torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1), token)
    assert token.tolist() == [7]


def test_noise_alone_decides_among_equal_logits(device):
    """With equal logits the token is the place of the largest of the 32-bit words."""
    rows, vocabulary = 16, 300
    seed, position = torch.arange(rows) * 7919 - 3, torch.arange(rows)
    token = torch.full((rows,), -1)
    sample(torch.zeros(rows, vocabulary), torch.ones(rows), seed, position, token)
    zeros = torch.zeros(rows, vocabulary)
    assert token.tolist() == sample_reference(zeros, torch.ones(rows), seed, position).tolist()
    assert len(set(token.tolist())) > rows // 2
