"""Norms, activation, rotation and sampling: kernels of one program or a few for each row."""

import pytest
import torch

from lorry.kernels.activation import swiglu, swiglu_reference
from lorry.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from lorry.kernels.rope import cos_sin_table, rope_write_kv, rope_write_kv_reference
from lorry.kernels.sampling import sample, sample_reference
from tests.support.kernel_cases import TOLERANCE, layout_of, poisoned_pool, relative_error

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b"])
def test_rotation_writes_only_the_rows_keys_and_values(device, dtype, name):
    torch.manual_seed(0)
    layout = layout_of(name, dtype)
    shape = layout.geometry
    heads = shape.heads + 2 * shape.kv_heads
    qkv = torch.randn(4, heads, shape.head_dim).to(dtype)
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    table = cos_sin_table(100, shape.head_dim, 1e4)
    position, page = torch.tensor([3, 40, 99, 0]), torch.tensor([3, 4, 6, 0])
    actual, expected = (poisoned_pool(8, layout, device) for _ in range(2))
    rotated = rope_write_kv_reference(q, k, v, table, position, page, expected, 1)
    rope_write_kv(q, k, v, table, position, page, actual, 1)
    assert relative_error(q, rotated) < TOLERANCE[dtype]
    written = ~expected.slices.isnan()
    assert torch.equal(~actual.slices.isnan(), written)
    error = relative_error(actual.slices[written], expected.slices[written])
    assert error < TOLERANCE[dtype]


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
