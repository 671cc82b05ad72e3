"""What every service must know of the base model, read from its Hugging Face directory.

Only config files and safetensors headers are read, so router and store need no torch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.kernels.page_layout import ModelGeometry
from lorry.rpc.model_config import CONFIG_FILE, ModelConfig, UnsupportedModel, read_json_object
from lorry.rpc.model_families import (
    DecoderOptions,
    read_family,
    read_geometry,
    read_options,
)
from lorry.rpc.model_tensors import Shapes, read_manifest, refuse_unused, tensor_shapes


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model's directory and the facts that all services agree on."""

    directory: Path
    architecture: str
    geometry: ModelGeometry
    options: DecoderOptions
    vocab_size: int
    max_context_tokens: int  # prompt and output
    eos_token_ids: frozenset[int]
    tie_embeddings: bool
    config: Mapping[str, Any]  # config.json
    digest: bytes  # sha256 of what is computed and of the tensor manifest

    def tensor_shapes(self) -> Shapes:
        return tensor_shapes(
            self.geometry,
            self.options,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tie_embeddings,
        )


def read_base_model(directory: Path) -> BaseModel:
    """Read the directory of `--model`; raises UnsupportedModel naming a file, field or tensor."""
    path = directory / CONFIG_FILE
    try:
        path.stat()
    except OSError as error:
        raise UnsupportedModel(
            f"--model {directory}: must be a directory with a {CONFIG_FILE} ({error.strerror})"
        ) from error
    fields = read_json_object(path)
    architecture, family = read_family(fields)
    config = ModelConfig(fields).over({"model_type": family.model_type, **family.defaults})
    config.require("model_type", (family.model_type,))
    geometry, options = read_geometry(config), read_options(config, family)
    vocab_size, tied = config.count("vocab_size"), config.flag("tie_word_embeddings")
    max_positions = config.count("max_position_embeddings")
    max_context_tokens = options.rope.context_tokens(max_positions)
    manifest = read_manifest(directory)
    refuse_unused(
        manifest, tensor_shapes(geometry, options, vocab_size=vocab_size, tie_embeddings=tied)
    )
    return BaseModel(
        directory=directory,
        architecture=architecture,
        geometry=geometry,
        options=options,
        vocab_size=vocab_size,
        max_context_tokens=max_context_tokens,
        eos_token_ids=_eos_token_ids(directory, config),
        tie_embeddings=tied,
        config=fields,
        digest=_digest(
            architecture, geometry, options, vocab_size, max_context_tokens, tied, manifest
        ),
    )


def _eos_token_ids(directory: Path, config: ModelConfig) -> frozenset[int]:
    """From generation_config.json, which wins as in transformers, or config.json."""
    path = directory / "generation_config.json"
    generation = read_json_object(path) if path.exists() else {}
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _digest(*facts: object) -> bytes:
    """Of their representation, in which a dataclass names its type and its fields."""
    return hashlib.sha256(repr(facts).encode()).digest()
