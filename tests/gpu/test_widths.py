"""Kernels at the widths of real models, whole and split over tensor-parallel ranks."""

import pytest
import torch

from lorry.kernels.activation import swiglu, swiglu_reference
from lorry.kernels.launch_settings import (
    LORA,
    SMALL_ROWS,
    decode_setting,
    lora_setting,
    prefill_setting,
    small_setting,
)
from lorry.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from lorry.kernels.page_layout import MODULES
from tests.support.kernel_cases import (
    GEOMETRIES,
    TOLERANCE,
    Adapter,
    layout_of,
    relative_error,
    store_adapters,
    store_sequences,
)
from tests.support.kernel_checks import check_attention, check_lora, check_rotation, rows_of

SIZES = (1, 2, 4, 8)  # of a tensor-parallel group
MODELS = [name for name in GEOMETRIES if name != "tiny"]
LENGTHS = [(1, 1), (15, 1), (130, 37), (1023, 1), (33, 1), (260, 260), (40, 5), (16, 1)]
ADAPTERS = (Adapter(MODULES, 3), Adapter(MODULES[:4], 16), Adapter(MODULES, 65))
SLOTS = [0, 1, 1, -1, 2, *[1] * 70, 0, *[2] * 17]


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_attention_matches_the_reference(device, dtype, name, tp_size):
    layout = layout_of(name, dtype, tp_size)
    heads = -(-layout.geometry.heads // tp_size)
    sequences = store_sequences(LENGTHS, layout, device, padding=3)
    for form in (decode_setting, prefill_setting):
        check_attention(sequences, heads, form(dtype, heads // layout.local_kv_heads))
    few = rows_of(sequences, slice(0, SMALL_ROWS))
    check_attention(few, heads, small_setting(dtype, heads // layout.local_kv_heads))


@pytest.mark.parametrize("name", MODELS)
def test_lora_matches_the_reference(device, dtype, name):
    pool, tables = store_adapters(ADAPTERS, layout_of(name, dtype), device)
    for rows in LORA:
        check_lora(SLOTS, pool, tables, lora_setting(dtype, rows))


@pytest.mark.parametrize("tp_size", SIZES[1:])
@pytest.mark.parametrize("name", MODELS)
def test_lora_of_split_widths_matches_the_reference(device, dtype, name, tp_size):
    pool, tables = store_adapters(ADAPTERS[:2], layout_of(name, dtype, tp_size), device)
    check_lora([0, 1, 1, -1, 1, 1, 0], pool, tables, lora_setting(dtype, 64))


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_rotation_writes_only_the_rows_keys_and_values(device, dtype, name, tp_size):
    check_rotation(layout_of(name, dtype, tp_size), device, rows=70)


@pytest.mark.parametrize("hidden", sorted({shape.hidden for shape in GEOMETRIES.values()}))
def test_norms_match_the_references(device, dtype, hidden):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 7, 3 * hidden).to(device, dtype)[:, :, hidden : 2 * hidden]
    weight = torch.randn(hidden).to(device, dtype)
    out = torch.full((7, hidden), torch.nan, dtype=dtype, device=device)
    rms_norm(x, weight, 1e-5, out)
    assert relative_error(out, rms_norm_reference(x, weight, 1e-5)) < TOLERANCE[dtype]
    normed, total = add_rms_norm_reference(x, residual, weight, 1e-5)
    add_rms_norm(x, residual, weight, 1e-5, out.fill_(torch.nan))
    assert relative_error(out, normed) < TOLERANCE[dtype]
    assert torch.equal(residual, total)


@pytest.mark.parametrize("width", sorted({shape.intermediate for shape in GEOMETRIES.values()}))
@pytest.mark.parametrize("tp_size", [1, 8])
def test_swiglu_matches_the_reference(device, dtype, width, tp_size):
    torch.manual_seed(0)
    gate, up = torch.randn(7, 2 * width // tp_size).to(device, dtype).chunk(2, dim=1)
    out = torch.full_like(gate, torch.nan)
    swiglu(gate, up, out)
    assert relative_error(out, swiglu_reference(gate, up)) < TOLERANCE[dtype]
