"""Model families on the GPU: tokens in float32, and windows and head norms in the kernels."""

from pathlib import Path

import pytest
import torch

from lorry.kernels.launch_settings import (
    SMALL_ROWS,
    decode_setting,
    prefill_setting,
    small_setting,
)
from tests.support.engines import EngineHarness
from tests.support.equal_tokens import check_answers
from tests.support.families import family_world
from tests.support.kernel_cases import layout_of, store_sequences
from tests.support.kernel_checks import check_attention, check_rotation, rows_of

# What RoPE scaling changes is a table, which the tests of the CPU compare.
FAMILIES = ["llama-linear-biased", "mistral", "qwen2-upper-windows", "qwen3"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [(1, 1), (16, 1), (130, 37), (4000, 1), (700, 129), (260, 260), (33, 1), (512, 64)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_transformers_and_peft(
    device: torch.device, tmp_path: Path, name: str
) -> None:
    world = family_world(tmp_path / "world", name)
    config = {"device": device.type, "dtype": "fp32", "step_tokens": 64}
    check_answers(world, EngineHarness(world.model, tmp_path, max_running=16, **config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-0.5b"])
@pytest.mark.parametrize("form", [decode_setting, prefill_setting])
@pytest.mark.parametrize("window", [1, 500])
def test_attention_in_a_window_matches_the_reference(device, dtype, model, form, window):
    layout = layout_of(model, dtype)
    shape = layout.geometry
    sequences = store_sequences(LENGTHS, layout, device, padding=3)
    check_attention(sequences, shape.heads, form(dtype, shape.heads // shape.kv_heads), window)
    few = rows_of(sequences, slice(0, SMALL_ROWS))
    check_attention(few, shape.heads, small_setting(dtype, shape.heads // shape.kv_heads), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen2.5-0.5b", "llama-70b"])
def test_rotation_of_normed_heads_matches_the_reference(device, dtype, model):
    check_rotation(layout_of(model, dtype), device, rows=70, has_norm=True)
