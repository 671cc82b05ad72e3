import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorry.kernels.page_layout import ModelGeometry
from lorry.rpc.base_model import read_base_model
from lorry.rpc.model_config import UnsupportedModel

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def write_model(directory: Path, **fields: Any) -> Path:
    config = {key: value for key, value in (CONFIG | fields).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {"model.norm.weight": np.ones(64, np.float32)}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_geometry_and_limits_come_from_the_config(tmp_path: Path) -> None:
    model = read_base_model(write_model(tmp_path))
    assert model.geometry == ModelGeometry(
        layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128
    )
    assert (model.vocab_size, model.max_context_tokens) == (100, 512)
    assert model.tie_embeddings
    assert model.eos_token_ids == {2}


def test_without_key_value_heads_there_are_as_many_as_query_heads(tmp_path: Path) -> None:
    assert read_base_model(write_model(tmp_path, num_key_value_heads=None)).geometry.kv_heads == 4


def test_a_head_size_of_its_own_wins(tmp_path: Path) -> None:
    assert read_base_model(write_model(tmp_path, head_dim=32)).geometry.head_dim == 32


@pytest.mark.parametrize(("eos", "ids"), [(7, {7}), ([7, 8], {7, 8}), (None, {2})])
def test_generation_config_wins_for_the_end_of_sequence(
    tmp_path: Path, eos: Any, ids: set[int]
) -> None:
    write_model(tmp_path)
    fields = {} if eos is None else {"eos_token_id": eos}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert read_base_model(tmp_path).eos_token_ids == ids


def test_a_model_may_have_no_end_of_sequence(tmp_path: Path) -> None:
    assert read_base_model(write_model(tmp_path, eos_token_id=None)).eos_token_ids == frozenset()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read_base_model(write_model(tmp_path, **fields))


def test_default_rope_parameters_are_served(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    assert read_base_model(write_model(tmp_path, rope_parameters=rope)).config["rope_parameters"]


@pytest.mark.parametrize("content", [None, "", "[]", "{", "\xff"])
def test_a_config_that_cannot_be_read_is_refused_by_file(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_base_model(tmp_path)


def test_weights_need_not_be_there_to_know_the_model(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    with_weights = read_base_model(directory)
    (directory / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    without = read_base_model(directory)
    assert without.geometry == with_weights.geometry
    assert without.digest != with_weights.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        (2**63).to_bytes(8, "little"),
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x04\0\0\0\0\0\0\0nope",
    ],
    ids=["empty", "short", "huge-header", "list", "no-json"],
)
def test_damaged_weights_are_refused_by_file(tmp_path: Path, content: bytes) -> None:
    (write_model(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors"):
        read_base_model(tmp_path)


def test_the_digest_changes_with_what_is_computed_and_with_nothing_else(tmp_path: Path) -> None:
    def digest(name: str, **fields: Any) -> bytes:
        directory = tmp_path / name
        directory.mkdir()
        return read_base_model(write_model(directory, **fields)).digest

    base = digest("base")
    assert digest("copy") == base
    assert digest("renamed", _name_or_path="elsewhere", transformers_version="9") == base
    assert digest("epsilon", rms_norm_eps=1e-6) != base
    assert digest("theta", rope_theta=1e6) != base
