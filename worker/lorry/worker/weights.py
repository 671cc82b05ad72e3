"""The base model's weights, read from safetensors files and joined as the model multiplies them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import safe_open

from lorry.kernels.page_layout import MODULES
from lorry.rpc.base_model import BaseModel, UnsupportedModel, tensor_files

RANDOM_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; projections are [output, input]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor  # q, k and v stacked
    o: torch.Tensor
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor  # gate and up stacked
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor  # [vocabulary, hidden]; the embedding where they are tied


class WeightReader(Protocol):
    """Where weights come from."""

    def read(self, name: str, *shape: int) -> torch.Tensor: ...


class CheckpointReader:
    """Named tensors of a model directory, checked for their shape, cast and moved."""

    def __init__(self, base_model: BaseModel, dtype: torch.dtype, device: torch.device) -> None:
        self._base_model = base_model
        self._dtype, self._device = dtype, device
        self._file_of = {
            name: path
            for path in tensor_files(base_model.directory)
            for name in _names(path.as_posix())
        }

    def read(self, name: str, *shape: int) -> torch.Tensor:
        """Raises UnsupportedModel if the tensor is missing or has another shape."""
        path = self._file_of.get(name)
        if path is None:
            directory = self._base_model.directory
            raise UnsupportedModel(f"no .safetensors file of {directory} has a tensor {name!r}")
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"tensor {name!r} must have shape {shape}, got {tuple(tensor.shape)}"
            )
        return tensor.to(device=self._device, dtype=self._dtype)


class RandomWeights:
    """Random normal tensors of any name and shape, for benchmarks; norms are near 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def read(self, name: str, *shape: int) -> torch.Tensor:
        mean = 1.0 if len(shape) == 1 else 0.0
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(mean, RANDOM_STANDARD_DEVIATION)


def num_weights(base_model: BaseModel) -> int:
    """Elements of all tensors of the model."""
    geometry = base_model.geometry
    projections = sum(math.prod(geometry.module_shape(module)) for module in MODULES)
    layer = projections + 2 * geometry.hidden
    embeddings = 1 if base_model.tie_embeddings else 2
    vocabulary = embeddings * base_model.vocab_size * geometry.hidden
    return vocabulary + geometry.layers * layer + geometry.hidden


def load_weights(base_model: BaseModel, reader: WeightReader) -> ModelWeights:
    """Read all weights; raises UnsupportedModel that names the tensor at fault."""
    vocabulary, hidden = base_model.vocab_size, base_model.geometry.hidden
    embedding = reader.read("model.embed_tokens.weight", vocabulary, hidden)
    tied = base_model.tie_embeddings
    return ModelWeights(
        embedding=embedding,
        layers=tuple(
            _load_layer(base_model, reader, f"model.layers.{layer}")
            for layer in range(base_model.geometry.layers)
        ),
        norm=reader.read("model.norm.weight", hidden),
        head=embedding if tied else reader.read("lm_head.weight", vocabulary, hidden),
    )


def _load_layer(base_model: BaseModel, reader: WeightReader, prefix: str) -> LayerWeights:
    geometry = base_model.geometry

    def projection(block: str, *modules: str) -> torch.Tensor:
        return torch.cat(
            [
                reader.read(
                    f"{prefix}.{block}.{module}.weight", *reversed(geometry.module_shape(module))
                )
                for module in modules
            ]
        )

    return LayerWeights(
        input_norm=reader.read(f"{prefix}.input_layernorm.weight", geometry.hidden),
        qkv=projection("self_attn", "q_proj", "k_proj", "v_proj"),
        o=projection("self_attn", "o_proj"),
        post_attention_norm=reader.read(
            f"{prefix}.post_attention_layernorm.weight", geometry.hidden
        ),
        gate_up=projection("mlp", "gate_proj", "up_proj"),
        down=projection("mlp", "down_proj"),
    )


def _names(path: str) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        yield from file.keys()
