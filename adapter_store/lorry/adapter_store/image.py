"""Page images: an adapter's weights packed as the GPU pool wants them.

The bytes are ``[page][layer][slice]`` by `lorry.kernels.page_layout`; whatever holds no weight
is zero. Pure numpy.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from lorry.adapter_store.lora import LoraSpec, tensor_names
from lorry.kernels.page_layout import Dtype, ModuleOffsets, PageLayout
from lorry.kernels.partition import Partition
from lorry.rpc.errors import AdapterIncompatible

Array = NDArray[Any]
NUMPY_DTYPES: Mapping[Dtype, np.dtype[Any]] = {
    Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.FP16: np.dtype(np.float16),
    Dtype.FP32: np.dtype(np.float32),
}
# Most of the time goes into copies and the first touch of the image's memory, which hold no lock of
# Python's.
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class ImageModule:
    """Where a module's A and transposed B begin in a layer's virtual space, in row units."""

    name: str
    row_offset: int
    b_row_offset: int
    scale_per_layer: tuple[float, ...]  # 0 where the layer has none


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a reader must know of an image beside its layout."""

    rank: int
    pages: int
    image_bytes: int
    crc32c: int
    modules: tuple[ImageModule, ...]


def image_bytes(spec: LoraSpec, layout: PageLayout) -> int:
    return layout.pages(spec.modules, spec.max_rank) * layout.page_bytes


def image_header(spec: LoraSpec, layout: PageLayout, checksum: int) -> ImageHeader:
    offsets = layout.offsets(spec.modules, spec.max_rank)
    return ImageHeader(
        rank=spec.max_rank,
        pages=layout.pages(spec.modules, spec.max_rank),
        image_bytes=image_bytes(spec, layout),
        crc32c=checksum,
        modules=tuple(
            ImageModule(name, offsets[name].a, offsets[name].b, lora.scales)
            for name, lora in spec.modules.items()
        ),
    )


def pack(
    spec: LoraSpec, tensors: Mapping[str, Array], layout: PageLayout, buffer: memoryview
) -> int:
    """Fill a zeroed buffer of `image_bytes` with the rank's part; returns the buffer's CRC-32C.

    Raises AdapterIncompatible if a value is not finite in the layout's dtype.
    """
    dtype, layers = NUMPY_DTYPES[layout.dtype], layout.geometry.layers
    pages = layout.pages(spec.modules, spec.max_rank)
    image_PLE = np.frombuffer(buffer, dtype).reshape(pages, layers, -1)

    def pack_layer(layer: int) -> None:
        virtual_V = np.zeros(pages * layout.slice_elements, dtype)
        _fill_layer(virtual_V, layer, spec, tensors, layout)
        image_PLE[:, layer] = virtual_V.reshape(pages, -1)

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(pack_layer, range(layers)):
            pass  # a failure is raised here, the first layer's first
    return crc32c(buffer)


def _fill_layer(
    virtual_V: Array, layer: int, spec: LoraSpec, tensors: Mapping[str, Array], layout: PageLayout
) -> None:
    """Put a layer's weights into its zeroed virtual space."""
    offsets, partition = layout.offsets(spec.modules, spec.max_rank), Partition(layout)
    for name, lora in spec.modules.items():
        if lora.ranks[layer]:
            a_name, b_name = tensor_names(layer, name)
            a = tensors[a_name][partition.a_rows(name), partition.inputs(name).indices]
            b = tensors[b_name][partition.adapter_outputs(name).indices].T
            parts = (
                cast_finite(a_name, a, virtual_V.dtype),
                cast_finite(b_name, b, virtual_V.dtype),
            )
            _write_rows(virtual_V, layout, name, offsets[name], parts)


def cast_finite(name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    """`values` as `dtype`; raises AdapterIncompatible if one of them is not finite then."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype, copy=False)
    if not _all_finite(cast):
        raise AdapterIncompatible(f"{name} holds values that are not finite in {dtype.name}")
    return cast


def _all_finite(values: Array) -> bool:
    """By bits: isfinite of ml_dtypes takes six times as long."""
    unsigned = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)
    magnitudes = values.view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)
    return bool((magnitudes < infinity).all())


def _write_rows(
    virtual_V: Array,
    layout: PageLayout,
    module: str,
    offsets: ModuleOffsets,
    parts: tuple[Array, Array],
) -> None:
    """Put the rows of A and of transposed B in their places; what pads them stays zero."""
    for start, padded, part in zip(offsets, layout.row_widths(module), parts, strict=True):
        first, (rows, width) = start * layout.row_unit, part.shape
        virtual_V[first : first + rows * padded].reshape(rows, padded)[:, :width] = part
