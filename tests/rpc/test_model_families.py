"""What each family's config.json means, and what in it is refused by name and value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorry.kernels.page_layout import MODULES
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.model_config import UnsupportedModel
from lorry.rpc.rope_options import Llama3Scaling

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 1000,
}
LLAMA, MISTRAL, QWEN2, QWEN3 = (f"{f}ForCausalLM" for f in ("Llama", "Mistral", "Qwen2", "Qwen3"))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 500,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}


def write_config(directory: Path, architecture: str, **fields: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"architectures": [architecture], **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read(directory: Path, architecture: str, **fields: Any) -> BaseModel:
    return read_base_model(write_config(directory, architecture, **fields))


def test_llama_has_no_options_unless_asked_for(tmp_path: Path) -> None:
    options = read(tmp_path, LLAMA).options
    assert (options.biased, options.qk_norm, options.windows) == ((), False, (None,) * 3)
    assert options.norm_epsilon == 1e-6
    assert options.rope.theta == 10_000.0
    assert options.rope.scaling is None


def test_llama_may_have_biases(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA, attention_bias=True).options.biased == MODULES[:4]
    assert read(tmp_path, LLAMA, mlp_bias=True).options.biased == MODULES[4:]


def test_mistral_s_rows_see_a_window_and_4096_tokens_where_none_is_written(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL, sliding_window=7).options.windows == (7,) * 3
    assert read(tmp_path, MISTRAL, sliding_window=None).options.windows == (None,) * 3
    long = {"max_position_embeddings": 5000}
    assert read(tmp_path, MISTRAL, **long).options.windows == (4096,) * 3


def test_a_window_that_holds_any_context_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL, sliding_window=1000).options.windows == (None,) * 3
    assert read(tmp_path, MISTRAL, sliding_window=999).options.windows == (999,) * 3


def test_qwen2_has_biases_of_q_k_and_v(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN2).options.biased == MODULES[:3]


@pytest.mark.parametrize("architecture", [QWEN2, QWEN3])
def test_qwen_s_windows_are_those_of_the_upper_layers_if_any(
    tmp_path: Path, architecture: str
) -> None:
    def windows(**fields: Any) -> tuple[int | None, ...]:
        return read(tmp_path, architecture, sliding_window=7, **fields).options.windows

    assert windows() == (None, None, None)
    assert windows(use_sliding_window=False, max_window_layers=1) == (None, None, None)
    assert windows(use_sliding_window=True, max_window_layers=1) == (None, 7, 7)
    assert windows(use_sliding_window=True, max_window_layers=0) == (7, 7, 7)
    assert windows(use_sliding_window=True) == (None, None, None)  # from the 28th on
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(use_sliding_window=True, layer_types=types) == (7, None, 7)


def test_qwen3_norms_heads_of_a_size_of_their_own(tmp_path: Path) -> None:
    model = read(tmp_path, QWEN3)
    assert model.options.qk_norm
    assert model.options.biased == ()
    assert model.geometry.head_dim == 128
    assert model.geometry.module_shape("q_proj") == (128, 512)
    assert model.geometry.module_shape("k_proj") == (128, 256)
    assert model.geometry.module_shape("o_proj") == (512, 128)
    assert read(tmp_path, QWEN3, attention_bias=True).options.biased == MODULES[:4]


def test_llama_3_scales_as_older_and_newer_directories_write_it(tmp_path: Path) -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=500
    )
    for fields in (
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ):
        model = read(tmp_path, LLAMA, **fields)
        assert model.options.rope.scaling == scaling
        assert model.options.rope.theta == 5e5
        assert model.max_context_tokens == 1000


def test_linear_scaling_and_yarn_lengthen_the_context(tmp_path: Path) -> None:
    linear = {"type": "linear", "factor": 2.5}
    assert read(tmp_path, LLAMA, rope_scaling=linear).max_context_tokens == 2500
    assert read(tmp_path, QWEN2, rope_scaling=YARN).max_context_tokens == 4000
    counted = {"rope_scaling": YARN, "max_position_embeddings": 4000}
    assert read(tmp_path, QWEN2, **counted).max_context_tokens == 4000


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "architectures": [LLAMA],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": [MISTRAL],
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B": {
        "architectures": [QWEN2],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        "architectures": [QWEN3],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_directories_as_they_are_published_are_served(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    model = read_base_model(tmp_path)
    assert model.max_context_tokens == PUBLISHED[name]["max_position_embeddings"]
    assert set(model.options.windows) == {4096 if name.startswith("Mistral") else None}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("MixtralForCausalLM", {}, "architecture 'MixtralForCausalLM'"),
    ("Qwen2MoeForCausalLM", {}, "architecture 'Qwen2MoeForCausalLM'"),
    ("Qwen3MoeForCausalLM", {}, "architecture 'Qwen3MoeForCausalLM'"),
    ("Gemma2ForCausalLM", {}, "architecture 'Gemma2ForCausalLM'"),
    (LLAMA, {"model_type": "granite"}, "model_type 'granite'"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts 8"),
    (QWEN3, {"num_experts": 128}, "num_experts 128"),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config .*'awq'"),
    (QWEN2, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window 4096"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias 'yes'"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps 0"),
    (LLAMA, {"head_dim": 80}, "head_dim 80"),
    (LLAMA, {"head_dim": 256}, "head_dim 256"),
    (LLAMA, {"hidden_size": 320}, "head_dim 80"),
    (LLAMA, {"hidden_size": 130}, "hidden_size 130"),
    (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    (MISTRAL, {"num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 8}, "heads 8"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window 0"),
    (MISTRAL, {"attention_bias": True}, "attention_bias True"),
    (MISTRAL, {"layer_types": ["full_attention"] * 3}, "layer_types"),
    (QWEN2, {"attention_bias": False}, "attention_bias False"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers -1"),
    (QWEN2, {"use_sliding_window": True, "sliding_window": 1.5}, "sliding_window 1.5"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    (QWEN3, {"layer_types": ["full_attention"] * 2}, "layer_types"),
    (QWEN3, {"layer_types": ["chunked_attention"] * 3}, "layer_types .*chunked_attention"),
    (QWEN3, {"mlp_bias": True}, "mlp_bias True"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (LLAMA, {"rope_theta": -1}, "rope_theta -1"),
    (LLAMA, {"rope_scaling": "llama3"}, "rope_scaling 'llama3'"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.rope_type 'dynamic'"),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    (QWEN2, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type 'mrope'"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor None"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2, "extra": 3}}, "extra 3"),
    (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor 1.0"),
    (LLAMA, {"rope_scaling": YARN | {"beta_fast": "many"}}, "beta_fast 'many'"),
    (LLAMA, {"rope_scaling": YARN | {"factor": float("inf")}}, "factor inf"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "full_attention"),
]


@pytest.mark.parametrize(("architecture", "fields", "named"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_not_computed_is_refused_by_field_and_value(
    tmp_path: Path, architecture: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read(tmp_path, architecture, **fields)


def save(directory: Path, name: str, tensors: Mapping[str, Any]) -> None:
    save_file(dict(tensors), directory / name, {"format": "pt"})


NORM = {"model.norm.weight": np.ones(128, np.float32)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.q_proj.bias", np.float32),
        ("model.layers.0.self_attn.q_norm.weight", np.float32),
        ("model.layers.0.mlp.experts.0.up_proj.weight", np.float32),
        ("model.layers.3.input_layernorm.weight", np.float32),
        ("model.layers.0.mlp.up_proj.weight", np.int8),
    ],
)
def test_a_tensor_that_the_model_would_leave_out_is_refused_by_name(
    tmp_path: Path, name: str, dtype: Any
) -> None:
    write_config(tmp_path, LLAMA)
    save(tmp_path, "model.safetensors", NORM | {name: np.ones(1, dtype)})
    with pytest.raises(UnsupportedModel, match=name):
        read_base_model(tmp_path)


def test_tensors_that_are_computed_anew_may_be_there(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(tmp_path, "model.safetensors", NORM | {name: np.ones(1, np.float32)})
    read_base_model(tmp_path)


def write_index(directory: Path, files: Mapping[str, Any]) -> None:
    content = json.dumps({"metadata": {}, "weight_map": files})
    (directory / "model.safetensors.index.json").write_text(content)


def test_only_the_files_of_the_index_are_read(tmp_path: Path) -> None:
    """Directories often hold the same weights once more under other names."""
    write_config(tmp_path, LLAMA)
    save(tmp_path, "a.safetensors", NORM)
    save(tmp_path, "consolidated.safetensors", {"layers.0.attention.wq.weight": np.ones(1)})
    write_index(tmp_path, {"model.norm.weight": "a.safetensors"})
    read_base_model(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a.bin", 7, None])
def test_an_index_names_files_beside_it(tmp_path: Path, name: Any) -> None:
    write_index(write_config(tmp_path, LLAMA), {"model.norm.weight": name})
    with pytest.raises(UnsupportedModel, match=r"index\.json: weight_map"):
        read_base_model(tmp_path)


def test_a_tensor_in_two_files_is_refused_by_name(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA)
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path, name, NORM)
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(UnsupportedModel, match=r"b\.safetensors: tensor 'model\.norm\.weight'"):
        read_base_model(tmp_path)


def test_every_option_changes_the_digest(tmp_path: Path) -> None:
    variants: list[tuple[str, dict[str, Any]]] = [
        (LLAMA, {}),
        (LLAMA, {"attention_bias": True}),
        (LLAMA, {"mlp_bias": True}),
        (LLAMA, {"rope_theta": 5e5}),
        (LLAMA, {"rope_scaling": LLAMA3}),
        (LLAMA, {"rope_scaling": LLAMA3 | {"factor": 4.0}}),
        (LLAMA, {"head_dim": 16}),
        (MISTRAL, {"sliding_window": None}),
        (MISTRAL, {"sliding_window": 7}),
        (MISTRAL, {"sliding_window": 8}),
        (QWEN2, {}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        (QWEN3, {}),
    ]
    digests = {read(tmp_path, name, **fields).digest for name, fields in variants}
    assert len(digests) == len(variants)
