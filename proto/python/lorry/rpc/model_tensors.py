"""The tensors of a decoder by name and shape; and what a checkpoint holds of them."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorry.kernels.page_layout import ModelGeometry
from lorry.rpc.model_config import UnsupportedModel, read_json_object
from lorry.rpc.model_families import ATTENTION, MLP, DecoderOptions

Shapes = dict[str, tuple[int, ...]]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ONE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20
DTYPES = frozenset({"F32", "F16", "BF16", "F64"})
UNUSED = ".rotary_emb.inv_freq"  # computed from the config; early checkpoints hold it


class TensorEntry(NamedTuple):
    """A tensor as a checkpoint's header describes it."""

    name: str
    dtype: str
    shape: tuple[Any, ...]


def tensor_shapes(
    geometry: ModelGeometry, options: DecoderOptions, *, vocab_size: int, tie_embeddings: bool
) -> Shapes:
    """All tensors that a model needs."""
    shapes: Shapes = {EMBEDDING: (vocab_size, geometry.hidden)}
    for layer in range(geometry.layers):
        shapes |= _layer_shapes(geometry, options, f"model.layers.{layer}")
    shapes["model.norm.weight"] = (geometry.hidden,)
    if not tie_embeddings:
        shapes[HEAD] = (vocab_size, geometry.hidden)
    return shapes


def _layer_shapes(geometry: ModelGeometry, options: DecoderOptions, prefix: str) -> Shapes:
    shapes: Shapes = {
        f"{prefix}.input_layernorm.weight": (geometry.hidden,),
        f"{prefix}.post_attention_layernorm.weight": (geometry.hidden,),
    }
    for block, modules in (("self_attn", ATTENTION), ("mlp", MLP)):
        for module in modules:
            inputs, outputs = geometry.module_shape(module)
            shapes[f"{prefix}.{block}.{module}.weight"] = (outputs, inputs)
            if module in options.biased:
                shapes[f"{prefix}.{block}.{module}.bias"] = (outputs,)
    if options.qk_norm:
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (geometry.head_dim,)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (geometry.head_dim,)
    return shapes


def tensor_files(directory: Path) -> list[Path]:
    """The checkpoint's files as transformers finds them; none where weights are made at random."""
    if (directory / ONE_FILE).exists():
        return [directory / ONE_FILE]
    index = directory / INDEX_FILE
    if not index.exists():
        return []
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(_is_file_name(name) for name in names.values()):
        raise UnsupportedModel(f"{index}: weight_map must map tensors to files beside it")
    return [directory / name for name in sorted(set(names.values()))]


def read_manifest(directory: Path) -> list[TensorEntry]:
    """Every tensor of the checkpoint, by name."""
    entries: dict[str, TensorEntry] = {}
    for path in tensor_files(directory):
        for entry in _tensors(path):
            if entry.name in entries:
                raise UnsupportedModel(f"{path}: tensor {entry.name!r} is in another file, too")
            entries[entry.name] = entry
    return [entries[name] for name in sorted(entries)]


def refuse_unused(manifest: Iterable[TensorEntry], shapes: Shapes) -> None:
    """Name a tensor that the model would leave out: the checkpoint is of another architecture."""
    for name, dtype, _ in manifest:
        if name.endswith(UNUSED) or name == HEAD:
            continue
        if name not in shapes:
            raise UnsupportedModel(f"tensor {name!r} of the checkpoint has no place in the model")
        if dtype not in DTYPES:
            raise UnsupportedModel(f"tensor {name!r} has the unsupported dtype {dtype!r}")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _tensors(path: Path) -> Iterator[TensorEntry]:
    try:
        for name, entry in _read_header(path).items():
            if name != "__metadata__":
                yield TensorEntry(name, str(entry["dtype"]), tuple(entry["shape"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise UnsupportedModel(f"{path} is no safetensors file: {error}") from error


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes is too large")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
        return header
