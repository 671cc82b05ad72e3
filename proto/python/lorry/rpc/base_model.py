"""What every service must know of the base model, read from its Hugging Face directory.

Only config files and safetensors headers are read, so router and store need no torch.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.kernels.page_layout import ModelGeometry

ARCHITECTURES = frozenset({"LlamaForCausalLM"})
MAX_HEADER_BYTES = 100 << 20
# The fields of config.json that decide what the model computes.
COMPUTED_BY = (
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


class UnsupportedModel(ValueError):
    """The directory holds no base model that can be served."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model's directory and the facts that all services agree on."""

    directory: Path
    architecture: str
    geometry: ModelGeometry
    vocab_size: int
    max_context_tokens: int  # prompt and output
    eos_token_ids: frozenset[int]
    tie_embeddings: bool
    config: Mapping[str, Any]  # config.json
    digest: bytes  # sha256 of the canonical config and tensor manifest


def read_base_model(directory: Path) -> BaseModel:
    """Read a model directory; raises UnsupportedModel that names the file or field."""
    config = _read_json(directory / "config.json")
    architecture = _architecture(config)
    _refuse_unsupported(config)
    return BaseModel(
        directory=directory,
        architecture=architecture,
        geometry=_geometry(config),
        vocab_size=_positive(config, "vocab_size"),
        max_context_tokens=_positive(config, "max_position_embeddings"),
        eos_token_ids=_eos_token_ids(directory, config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        config=config,
        digest=_digest(directory, config),
    )


def tensor_files(directory: Path) -> list[Path]:
    """The model's safetensors files; none where weights are made at random."""
    return sorted(directory.glob("*.safetensors"))


def _geometry(config: Mapping[str, Any]) -> ModelGeometry:
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    try:
        return ModelGeometry(
            layers=_positive(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=_positive(config, "intermediate_size"),
        )
    except (TypeError, ValueError) as error:
        raise UnsupportedModel(f"config.json: {error}") from error


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel(
            f"config.json: architecture {names[0]!r} is not one of {sorted(ARCHITECTURES)}"
        )
    return str(names[0])


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Name an option that would change what the model computes and is not implemented."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    options = {
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_parameters.rope_type": (rope_type, "default"),
        "quantization_config": (config.get("quantization_config"), None),
    }
    for field, (value, supported) in options.items():
        if value != supported:
            raise UnsupportedModel(f"config.json: {field} {value!r} is not supported")


def _positive(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"config.json: {field} must be a positive integer, got {value!r}")
    return value


def _eos_token_ids(directory: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """From generation_config.json, which wins as in transformers, or config.json."""
    path = directory / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _digest(directory: Path, config: Mapping[str, Any]) -> bytes:
    canonical = {field: config.get(field) for field in COMPUTED_BY}
    manifest = sorted(entry for path in tensor_files(directory) for entry in _tensors(path))
    text = json.dumps([canonical, manifest], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def _tensors(path: Path) -> Iterator[list[Any]]:
    """Name, dtype and shape of each."""
    try:
        for name, entry in _read_header(path).items():
            if name != "__metadata__":
                yield [name, entry["dtype"], entry["shape"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise UnsupportedModel(f"{path} is no safetensors file: {error}") from error


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes is too large")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
        return header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path}: must hold a JSON object")
    return content
