"""Every kernel under every shipped launch setting against its reference."""

import pytest
import torch

from lorry.kernels.activation import swiglu, swiglu_reference
from lorry.kernels.attention_plan import allocate_attention_work, plan_attention
from lorry.kernels.launch_settings import (
    LORA,
    SMALL_ROWS,
    decode_setting,
    lora_setting,
    prefill_setting,
    small_setting,
)
from lorry.kernels.lora_plan import allocate_lora_work, plan_lora
from lorry.kernels.norm import add_rms_norm, add_rms_norm_reference
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.sampling import sample, sample_reference
from tests.support.digest import digest
from tests.support.kernel_cases import (
    LAYER,
    MIXED_ADAPTERS,
    TOLERANCE,
    layout_of,
    mixes,
    relative_error,
    store_adapters,
    store_sequences,
)
from tests.support.kernel_checks import (
    adapt,
    attend,
    attend_small,
    check_attention,
    check_lora,
    check_rotation,
)
from tests.support.rotation_checks import check_expand_rope

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = ["llama-2-7b", "llama-3-8b", "qwen2.5-0.5b", "llama-70b"]
RAGGED = [(1, 1), (15, 1), (16, 1), (17, 1), (300, 1), (1023, 1), (64, 1), (4000, 1), (33, 1)]
CHUNKS = [(130, 37), (1, 1), (260, 260), (700, 129), (2000, 1), (40, 5), (512, 64)]
SMALL_STEPS = [[(1, 1)], [(2100, 1)], [(150, 1), (17, 1)], [(90, 1), (1200, 1), (1, 1)], [(300, 4)]]
MIXES = mixes(200, len(MIXED_ADAPTERS))
# What ships, each once: float32 has one setting for steps of all sizes.
LORA_SETTINGS = [(d, rows) for d in DTYPES for rows in LORA if d != torch.float32 or rows == 64]
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lengths", SMALL_STEPS, ids=str)
def test_attention_of_small_steps_matches_the_reference(device, dtype, model, lengths):
    layout = layout_of(model, dtype)
    shape = layout.geometry
    padding = SMALL_ROWS - sum(new for _, new in lengths)
    sequences = store_sequences(lengths, layout, device, padding=padding)
    check_attention(sequences, shape.heads, small_setting(dtype, shape.heads // shape.kv_heads))


def test_attention_of_small_steps_repeats_bit_for_bit(device, dtype):
    sequences = store_sequences([(1500, 1), (300, 2)], layout_of("llama-3-8b", dtype), device)
    q_TQD = torch.randn(3, 32, 128).to(sequences.pool.slices)
    setting = small_setting(dtype, 4)
    outcomes = {digest(attend_small(sequences, q_TQD, setting)) for _ in range(TWENTY)}
    assert len(outcomes) == 1


def test_attention_of_many_sequences_matches_the_reference(device):
    generator = torch.Generator().manual_seed(0)
    lengths = [(int(n), 1) for n in torch.randint(1, 700, (300,), generator=generator)]
    layout = layout_of("llama-3-8b", torch.bfloat16)
    sequences = store_sequences(lengths, layout, device, padding=20)
    check_attention(sequences, 32, decode_setting(torch.bfloat16, 4))


@pytest.mark.parametrize("form", [decode_setting, prefill_setting])
def test_attention_of_a_large_step_matches_the_reference(device, dtype, form):
    sequences = store_sequences(
        [*RAGGED, *CHUNKS] * 2 + [(900, 200)], layout_of("llama-3-8b", dtype), device
    )
    assert len(sequences.sequence_T) > 1024
    check_attention(sequences, 32, form(dtype, 4))


@pytest.mark.parametrize("form", [decode_setting, prefill_setting])
def test_a_plan_of_nothing_writes_nothing(device, dtype, form):
    sequences = store_sequences([(1, 1), (300, 1)], layout_of("llama-3-8b", dtype), device)
    sequences.sequence_T.fill_(-1)
    q_TQD = torch.randn(2, 32, 128).to(sequences.pool.slices)
    assert attend(sequences, q_TQD, form(dtype, 4)).isnan().all()


@pytest.mark.parametrize("form", [decode_setting, prefill_setting])
def test_attention_repeats_bit_for_bit(device, dtype, form):
    sequences = store_sequences(CHUNKS, layout_of("llama-3-8b", dtype), device)
    q_TQD = torch.randn(len(sequences.sequence_T), 32, 128).to(sequences.pool.slices)
    outcomes = {digest(attend(sequences, q_TQD, form(dtype, 4))) for _ in range(TWENTY)}
    assert len(outcomes) == 1


def test_a_captured_step_follows_new_lengths_without_the_host(gpu):
    """One graph of plan and attention, replayed after the device tensors have changed."""
    layout = layout_of("llama-3-8b", torch.bfloat16)
    long = store_sequences([(900, 1), (50, 1)], layout, gpu)
    setting = decode_setting(torch.bfloat16, 4)
    work = allocate_attention_work(
        setting, max_rows=2, heads=32, kv_heads=8, head_dim=128, device=gpu
    )
    q_TQD = torch.randn(2, 32, 128).to(long.pool.slices)
    out_TQD = torch.empty_like(q_TQD)
    position_T = long.position_T.clone()

    def step():
        plan_attention(long.sequence_T, position_T, work)
        out_TQD.zero_()  # another kernel than the plan's stands before
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


@pytest.mark.parametrize(("dtype", "rows"), LORA_SETTINGS, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_lora_of_mixed_ranks_matches_the_reference(device, dtype, mix, rows):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("tiny", dtype), device)
    check_lora(MIXES[mix], pool, tables, lora_setting(dtype, rows))


@pytest.mark.parametrize(("dtype", "rows"), LORA_SETTINGS, ids=str)
def test_lora_of_odd_numbers_of_rows_matches_the_reference(device, dtype, rows):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("tiny", dtype), device)
    for slots in ([4], [-1], [0, 4], [2] * 3, [1] * 15 + [3] * 17, [4] * 33, [-1, 2] * 16 + [0]):
        check_lora(slots, pool, tables, lora_setting(dtype, rows), groups=(0, 1))


@pytest.mark.parametrize("num_rows", [1000, 1024, 2048])
def test_lora_of_large_steps_matches_the_reference(device, dtype, num_rows):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("tiny", dtype), device)
    for mix in ("uniform", "zipf"):
        slots = mixes(num_rows, len(MIXED_ADAPTERS))[mix]
        check_lora(slots, pool, tables, lora_setting(dtype, num_rows), groups=(0, 3))


@pytest.mark.parametrize(("dtype", "rows"), LORA_SETTINGS, ids=str)
@pytest.mark.parametrize("model", ["llama-3-8b", "llama-2-7b", "qwen2.5-0.5b"])
def test_fused_rotation_matches_the_reference_and_two_kernels(device, dtype, model, rows):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of(model, dtype), device)
    setting = lora_setting(dtype, rows)
    for mix in MIXES.values():
        check_expand_rope(mix[: min(rows, 64)], pool, tables, setting)
    check_expand_rope([-1, 2] * 16 + [4] * 33 + [1], pool, tables, setting)


@pytest.mark.parametrize("rows", [*LORA])
def test_lora_repeats_bit_for_bit(device, dtype, rows):
    """The partial sums of A's splits, too."""
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("llama-3-8b", dtype), device)
    slot_T = torch.tensor(MIXES["uniform"], dtype=torch.int32, device=device)
    work = allocate_lora_work(
        lora_setting(dtype, rows), pool.layout, max_rows=len(slot_T), device=device
    )
    x_TI, base = torch.randn(len(slot_T), 4096), torch.randn(len(slot_T), 6144)
    outcomes = set()
    for _ in range(TWENTY):
        plan_lora(slot_T, tables, work)
        out = adapt(x_TI.to(pool.slices), base.to(pool.slices), 0, pool, tables, work)
        outcomes.add((digest(out), digest(work.y)))
    assert len(outcomes) == 1


def test_a_captured_step_follows_new_adapters_without_the_host(gpu, dtype):
    """One graph of plan, shrink and expand, replayed after the rows' slots have changed."""
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("tiny", dtype), gpu)
    slot_T = torch.tensor(MIXES["distinct"], dtype=torch.int32, device=gpu)
    work = allocate_lora_work(
        lora_setting(dtype, 64), pool.layout, max_rows=len(slot_T), device=gpu
    )
    x_TI = torch.randn(len(slot_T), 192).to(pool.slices)
    base = torch.randn(len(slot_T), 320).to(pool.slices)

    def step():
        plan_lora(slot_T, tables, work)
        return adapt(x_TI, base, 0, pool, tables, work)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for mix in ("none", "identical", "skewed", "none", "zipf"):
        slot_T.copy_(torch.tensor(MIXES[mix]))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, step())
        assert torch.equal(replayed, base) == (mix == "none")


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
    check_rotation(layout_of(name, dtype), device, rows=70)


def test_samples_equal_the_references(device):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(64, 128256, device=device, generator=generator)
    temperature = torch.linspace(-0.5, 2, 64, device=device).clamp(min=0)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (64,), device=device, generator=generator)
    position = torch.arange(64, device=device)
    token = torch.full((64,), -1, device=device)
    sample(logits, temperature, seed, position, token)
    assert torch.equal(token, sample_reference(logits, temperature, seed, position))
