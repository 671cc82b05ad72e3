"""The base model's weights, read from safetensors files and joined as the model multiplies them.

A tensor-parallel rank reads its own parts of them only.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import safe_open

from lorry.kernels.page_layout import ROW_PARALLEL
from lorry.kernels.partition import Part, Partition
from lorry.rpc.base_model import BaseModel
from lorry.rpc.model_config import UnsupportedModel
from lorry.rpc.model_families import DOWN, GATE_UP, OUTPUT, QKV
from lorry.rpc.model_tensors import EMBEDDING, HEAD, tensor_files
from lorry.worker.operations import HeadNorms, Projection

RANDOM_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: torch.Tensor
    qkv: Projection
    head_norms: HeadNorms | None
    o: Projection
    post_attention_norm: torch.Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor  # [vocabulary, hidden]; the embedding where they are tied


class WeightReader(Protocol):
    """Where weights come from."""

    def holds(self, name: str) -> bool: ...

    def read(self, name: str, *parts: Part) -> torch.Tensor:
        """One part of each dimension of the tensor, zeros where it is padded."""
        ...


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

    def holds(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, *parts: Part) -> torch.Tensor:
        """Raises UnsupportedModel if the tensor is missing or has another shape."""
        path = self._file_of.get(name)
        if path is None:
            directory = self._base_model.directory
            raise UnsupportedModel(f"no .safetensors file of {directory} has a tensor {name!r}")
        shape = tuple(part.whole for part in parts)
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise UnsupportedModel(
                    f"tensor {name!r} must have shape {shape}, got {tuple(stored.get_shape())}"
                )
            tensor = stored[tuple(part.indices for part in parts)]
        return padded(tensor.to(device=self._device, dtype=self._dtype), parts)


class RandomWeights:
    """Random normal tensors of any name and shape, for benchmarks; norms are near 1.

    A tensor is drawn from its name and whole shape, so that ranks hold parts of the same one.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def holds(self, name: str) -> bool:
        return False  # but makes what is asked for

    def read(self, name: str, *parts: Part) -> torch.Tensor:
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        shape = tuple(part.whole for part in parts)
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator("cpu" if tensor.is_meta else self._device)  # meta has none
        generator.manual_seed(zlib.crc32(name.encode()))
        tensor.normal_(mean, RANDOM_STANDARD_DEVIATION, generator=generator)
        if all(part.is_whole for part in parts):
            return tensor
        # A copy, so that the whole tensor goes.
        return padded(tensor[tuple(part.indices for part in parts)].clone(), parts)


def padded(tensor: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """`tensor` with zeros behind what it holds of each part; itself if nothing is missing."""
    if all(part.length == part.width for part in parts):
        return tensor
    out = tensor.new_zeros([part.width for part in parts])
    out[tuple(slice(part.length) for part in parts)] = tensor
    return out


def num_weights(base_model: BaseModel, partition: Partition) -> int:
    """Elements of all tensors of a rank's part of the model."""
    counter = _Counter()
    load_weights(base_model, counter, partition)
    return counter.num_elements


class _Counter:
    """Counts what is read; see `WeightReader`."""

    def __init__(self) -> None:
        self.num_elements = 0

    def holds(self, name: str) -> bool:
        return False

    def read(self, name: str, *parts: Part) -> torch.Tensor:
        shape = [part.width for part in parts]
        self.num_elements += math.prod(shape)
        return torch.empty(shape, device="meta")


def load_weights(base_model: BaseModel, reader: WeightReader, partition: Partition) -> ModelWeights:
    """Read a rank's weights; raises UnsupportedModel that names the tensor at fault."""
    return _WeightLoader(base_model, reader, partition).load()


class _WeightLoader:
    """Joins the tensors of a model as it multiplies them."""

    def __init__(self, base_model: BaseModel, reader: WeightReader, partition: Partition) -> None:
        self._base_model = base_model
        self._reader = reader
        self._partition = partition
        self._shapes = base_model.tensor_shapes()
        self._vocabulary = (
            partition.vocabulary(base_model.vocab_size),
            Part.all_of(base_model.geometry.hidden),
        )

    def load(self) -> ModelWeights:
        embedding = self._reader.read(EMBEDDING, *self._vocabulary)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(
                self._layer(f"model.layers.{layer}")
                for layer in range(self._base_model.geometry.layers)
            ),
            norm=self._whole("model.norm.weight"),
            head=self._head(embedding),
        )

    def _head(self, embedding: torch.Tensor) -> torch.Tensor:
        if not self._base_model.tie_embeddings:
            return self._reader.read(HEAD, *self._vocabulary)
        if self._reader.holds(HEAD):  # as some directories repeat it
            head = self._reader.read(HEAD, *self._vocabulary)
            if not torch.equal(head, embedding):
                raise UnsupportedModel(
                    f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
                )
        return embedding

    def _layer(self, prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=self._whole(f"{prefix}.input_layernorm.weight"),
            qkv=self._projection(attention, *QKV),
            head_norms=self._head_norms(attention),
            o=self._projection(attention, *OUTPUT),
            post_attention_norm=self._whole(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._projection(mlp, *GATE_UP),
            down=self._projection(mlp, *DOWN),
        )

    def _projection(self, block: str, *modules: str) -> Projection:
        """The modules of a group, which all have a bias or none.

        The products of row-parallel modules are summed over the ranks: the first one adds the bias.
        """
        weight = torch.cat([self._weight(block, module) for module in modules])
        if not set(modules) & set(self._base_model.options.biased):
            return Projection(weight)
        if set(modules) <= ROW_PARALLEL and self._partition.layout.tp_rank:
            return Projection(weight)
        return Projection(
            weight,
            torch.cat(
                [
                    self._reader.read(f"{block}.{module}.bias", self._partition.outputs(module))
                    for module in modules
                ]
            ),
        )

    def _weight(self, block: str, module: str) -> torch.Tensor:
        parts = self._partition.outputs(module), self._partition.inputs(module)
        return self._reader.read(f"{block}.{module}.weight", *parts)

    def _head_norms(self, block: str) -> HeadNorms | None:
        if not self._base_model.options.qk_norm:
            return None
        return HeadNorms(
            self._whole(f"{block}.q_norm.weight"), self._whole(f"{block}.k_norm.weight")
        )

    def _whole(self, name: str) -> torch.Tensor:
        return self._reader.read(name, *map(Part.all_of, self._shapes[name]))


def _names(path: str) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        yield from file.keys()
