"""Small LoRA adapters in the PEFT format, as numpy arrays."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lorry.adapter_store.image import ImageHeader, image_bytes, image_header, pack
from lorry.adapter_store.lora import tensor_names, tensor_shapes
from lorry.adapter_store.peft_config import resolve
from lorry.kernels.page_layout import ModelGeometry, PageLayout

Tensors = dict[str, NDArray[Any]]
TINY = ModelGeometry(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128)


def lora_config(
    *, r: int = 8, targets: Iterable[str] | str = ("q_proj", "v_proj"), **fields: Any
) -> dict[str, Any]:
    """The fields of an adapter_config.json; alpha is twice the rank."""
    target_modules = targets if isinstance(targets, str) else list(targets)
    defaults = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 2 * r}
    return defaults | {"r": r, "target_modules": target_modules} | fields


def lora_tensors(
    config: Mapping[str, Any],
    geometry: ModelGeometry = TINY,
    *,
    seed: int = 0,
    dtype: type[Any] = np.float32,
) -> Tensors:
    """Random normal weights for everything that the config targets."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer, module, rank in resolve(config, geometry).parts():
        shapes = tensor_shapes(geometry, module, rank)
        for name, shape in zip(tensor_names(layer, module), shapes, strict=True):
            tensors[name] = random.standard_normal(shape, np.float32).astype(dtype)
    return tensors


def lora_files(config: Mapping[str, Any], tensors: Tensors) -> tuple[str, bytes]:
    """adapter_config.json and adapter_model.safetensors."""
    return json.dumps(config), save(tensors, {"format": "pt"})


def build_image(
    config: Mapping[str, Any], tensors: Tensors, layout: PageLayout
) -> tuple[ImageHeader, bytearray]:
    """An adapter's page image, packed as the store does."""
    spec = resolve(config, layout.geometry)
    with tempfile.TemporaryFile(buffering=0) as file:
        checksum = pack(spec, tensors, layout, file.fileno())
        image = bytearray(file.read())
    assert len(image) == image_bytes(spec, layout)
    return image_header(spec, layout, checksum), image
