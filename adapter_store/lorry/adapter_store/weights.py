"""Are these the weights of this adapter? Compares a safetensors file with a resolved config."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from lorry.adapter_store.image import cast_finite
from lorry.adapter_store.lora import LoraSpec, tensor_names, tensor_shapes
from lorry.adapter_store.safetensors_file import SafetensorsFile
from lorry.kernels.page_layout import ModelGeometry
from lorry.rpc.errors import AdapterIncompatible, AdapterInvalid


class CheckedWeights(NamedTuple):
    digest: bytes  # of the canonical config and tensors: the version
    weights_bytes: int  # of all tensors


def check_weights(
    content: memoryview, spec: LoraSpec, geometry: ModelGeometry, dtype: np.dtype[Any]
) -> CheckedWeights:
    """Check names, shapes and that all values are finite in `dtype`; raises AdapterInvalid."""
    file = SafetensorsFile(content)
    expected = _expected_shapes(spec, geometry)
    _check_names(file, expected)
    digest = hashlib.sha256(spec.to_json().encode())
    for name, shape in expected.items():
        entry = file.entries[name]
        if list(entry.shape) != shape:
            raise AdapterInvalid.of(name, f"shape must be {shape}, got {list(entry.shape)}")
        try:
            cast_finite(name, file.tensor(name), dtype)
        except AdapterIncompatible as error:
            raise AdapterInvalid.of(name, f"not all values are finite in {dtype.name}") from error
        digest.update(f"\n{name} {entry.dtype} {shape}\n".encode())
        digest.update(file.raw(name))
    weights_bytes = sum(len(file.raw(name)) for name in expected)
    return CheckedWeights(digest.digest(), weights_bytes)


def _expected_shapes(spec: LoraSpec, geometry: ModelGeometry) -> dict[str, list[int]]:
    """By tensor name, in canonical order."""
    return {
        name: shape
        for layer, module, rank in spec.parts()
        for name, shape in zip(
            tensor_names(layer, module), tensor_shapes(geometry, module, rank), strict=True
        )
    }


def _check_names(file: SafetensorsFile, expected: dict[str, list[int]]) -> None:
    for name in sorted(file.entries.keys() - expected.keys()):
        raise AdapterInvalid.of(name[:200], "the config targets no module of this name here")
    for name in sorted(expected.keys() - file.entries.keys()):
        raise AdapterInvalid.of(name, "the config targets this module, but the tensor is missing")
