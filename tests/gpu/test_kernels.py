"""Every kernel under every shipped launch setting against its reference."""

import pytest
import torch

from lorry.kernels.activation import swiglu, swiglu_reference
from lorry.kernels.attention_plan import allocate_attention_work, plan_attention
from lorry.kernels.launch_settings import LORA, decode_setting, lora_setting, prefill_setting
from lorry.kernels.norm import add_rms_norm, add_rms_norm_reference
from lorry.kernels.page_layout import MODULES
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.rope import cos_sin_table, rope_write_kv, rope_write_kv_reference
from lorry.kernels.sampling import sample, sample_reference
from tests.support.kernel_cases import (
    GEOMETRIES,
    LAYER,
    MIXED_ADAPTERS,
    TOLERANCE,
    Adapter,
    layout_of,
    mixes,
    poisoned_pool,
    relative_error,
    store_adapters,
    store_sequences,
)
from tests.support.kernel_checks import attend, check_attention, check_lora

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = ["llama-2-7b", "llama-3-8b", "qwen2.5-0.5b", "llama-70b"]
RAGGED = [(1, 1), (15, 1), (16, 1), (17, 1), (300, 1), (1023, 1), (64, 1), (4000, 1), (33, 1)]
CHUNKS = [(130, 37), (1, 1), (260, 260), (700, 129), (2000, 1), (40, 5), (512, 64)]
MIXES = mixes(200, len(MIXED_ADAPTERS))
SPLIT_MODELS = [("llama-3-8b", 4), ("qwen2.5-0.5b", 2), ("llama-2-7b", 8), ("llama-70b", 8)]
TWENTY = 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", [decode_setting, prefill_setting])
@pytest.mark.parametrize("lengths", [RAGGED, CHUNKS], ids=["ragged", "chunks"])
def test_attention_matches_the_reference(device, dtype, model, form, lengths):
    layout = layout_of(model, dtype)
    shape = layout.geometry
    sequences = store_sequences(lengths, layout, device, padding=3)
    check_attention(sequences, shape.heads, form(dtype, shape.heads // shape.kv_heads))


def test_attention_of_many_sequences_matches_the_reference(device):
    generator = torch.Generator().manual_seed(0)
    lengths = [(int(n), 1) for n in torch.randint(1, 700, (300,), generator=generator)]
    layout = layout_of("llama-3-8b", torch.bfloat16)
    sequences = store_sequences(lengths, layout, device, padding=20)
    check_attention(sequences, 32, decode_setting(torch.bfloat16, 4))


def test_attention_repeats_bit_for_bit(device):
    layout = layout_of("llama-3-8b", torch.bfloat16)
    sequences = store_sequences(CHUNKS, layout, device)
    q_TQD = torch.randn(len(sequences.sequence_T), 32, 128).to(sequences.pool.slices)
    setting = decode_setting(torch.bfloat16, 4)
    first = attend(sequences, q_TQD, setting)
    for _ in range(TWENTY):
        assert torch.equal(attend(sequences, q_TQD, setting), first)


def test_a_captured_step_follows_new_lengths_without_the_host(device):
    """One graph of plan and attention, replayed after the device tensors have changed."""
    layout = layout_of("llama-3-8b", torch.bfloat16)
    long = store_sequences([(900, 1), (50, 1)], layout, device)
    setting = decode_setting(torch.bfloat16, 4)
    work = allocate_attention_work(
        setting, max_rows=2, heads=32, kv_heads=8, head_dim=128, device=device
    )
    q_TQD = torch.randn(2, 32, 128).to(long.pool.slices)
    out_TQD = torch.empty_like(q_TQD)
    position_T = long.position_T.clone()

    def step():
        plan_attention(long.sequence_T, position_T, work)
        paged_attention(q_TQD, long.pool, LAYER, long.block_table_SP, work, out_TQD)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for position in ([3, 49], [899, 0], [500, 17]):
        position_T.copy_(torch.tensor(position))
        graph.replay()
        replayed = out_TQD.clone()
        step()
        assert torch.equal(replayed, out_TQD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rows", [*LORA])
def test_lora_of_mixed_ranks_matches_the_reference(device, dtype, mix, rows):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("tiny", dtype), device)
    check_lora(MIXES[mix], pool, tables, lora_setting(dtype, rows))


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "tiny"])
def test_lora_of_real_widths_matches_the_reference(device, name):
    adapters = (Adapter(MODULES, 3), Adapter(MODULES[:4], 16), Adapter(MODULES, 65))
    pool, tables = store_adapters(adapters, layout_of(name, torch.bfloat16), device)
    slots = [0, 1, 1, -1, 2, *[1] * 70, 0, *[2] * 17]
    for rows in LORA:
        check_lora(slots, pool, tables, lora_setting(torch.bfloat16, rows))


@pytest.mark.parametrize(("name", "tp_size"), SPLIT_MODELS)
def test_lora_of_split_widths_matches_the_reference(device, name, tp_size):
    adapters = (Adapter(MODULES, 3), Adapter(MODULES[:4], 16))
    pool, tables = store_adapters(adapters, layout_of(name, torch.bfloat16, tp_size), device)
    check_lora([0, 1, 1, -1, 0], pool, tables, lora_setting(torch.bfloat16, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_activation_match_the_references(device, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(70, 4096, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(4096, device=device, dtype=dtype)
    out = torch.full_like(x, torch.nan)
    normed, total = add_rms_norm_reference(x, residual, weight, 1e-5)
    add_rms_norm(x, residual, weight, 1e-5, out)
    assert relative_error(out, normed) < TOLERANCE[dtype]
    assert torch.equal(residual, total)
    gate, up = torch.randn(70, 22016, device=device, dtype=dtype).chunk(2, dim=1)
    out = torch.full_like(gate, torch.nan)
    swiglu(gate, up, out)
    assert relative_error(out, swiglu_reference(gate, up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rotation_writes_only_the_rows_keys_and_values(device, dtype, name):
    torch.manual_seed(0)
    layout = layout_of(name, dtype)
    shape = layout.geometry
    heads = shape.heads + 2 * shape.kv_heads
    qkv = torch.randn(70, heads, shape.head_dim, device=device).to(dtype)
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    table = cos_sin_table(5000, shape.head_dim, 5e5).to(device)
    position = torch.randint(0, 5000, (70,), device=device)
    page = torch.randperm(99, device=device)[:70]
    actual, expected = (poisoned_pool(100, layout, device) for _ in range(2))
    rotated = rope_write_kv_reference(q, k, v, table, position, page, expected, LAYER)
    rope_write_kv(q, k, v, table, position, page, actual, LAYER)
    assert relative_error(q, rotated) < TOLERANCE[dtype]
    written = ~expected.slices.isnan()
    assert torch.equal(~actual.slices.isnan(), written)
    assert relative_error(actual.slices[written], expected.slices[written]) < TOLERANCE[dtype]


def test_samples_equal_the_references(device):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(64, 128256, device=device, generator=generator)
    temperature = torch.linspace(-0.5, 2, 64, device=device).clamp(min=0)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (64,), device=device, generator=generator)
    position = torch.arange(64, device=device)
    token = torch.full((64,), -1, device=device)
    sample(logits, temperature, seed, position, token)
    assert torch.equal(token, sample_reference(logits, temperature, seed, position))
