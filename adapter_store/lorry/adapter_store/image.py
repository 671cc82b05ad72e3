"""Page images: an adapter's weights packed as the GPU pool wants them.

The bytes are ``[page][layer][slice]`` by `lorry.kernels.page_layout`; whatever holds no weight
is zero. Pure numpy.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ml_dtypes
import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from lorry.adapter_store.combined_crc import CombinedCrc
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
# Most of the time goes into copies and writes, which hold no lock of Python's.
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


def pack(spec: LoraSpec, tensors: Mapping[str, Array], layout: PageLayout, file: int) -> int:
    """Write the rank's part to an open file of `image_bytes`; returns the image's CRC-32C.

    The tensors are finite in their own dtypes. Raises AdapterIncompatible if a value is not in the
    layout's.

    Memory that is written to through a mapping is zeroed first and mapped page by page: 80 MiB cost
    74 ms of CPU like this and 125 ms like that.
    """
    dtype, layers = NUMPY_DTYPES[layout.dtype], layout.geometry.layers
    pages = layout.pages(spec.modules, spec.max_rank)
    slice_bytes = layout.page_bytes // layers

    def pack_layer(layer: int) -> list[int]:
        """The CRC-32C of the layer's slice of each page."""
        virtual_V = np.zeros(pages * layout.slice_elements, dtype)
        _fill_layer(virtual_V, layer, spec, tensors, layout)
        virtual = virtual_V.view(np.uint8).data
        slices = [virtual[page * slice_bytes :][:slice_bytes] for page in range(pages)]
        for page, content in enumerate(slices):
            _write(file, content, page * layout.page_bytes + layer * slice_bytes)
        return [crc32c(content) for content in slices]

    with ThreadPoolExecutor(THREADS) as threads:
        checksums_LP = list(threads.map(pack_layer, range(layers)))
    by_page = zip(*checksums_LP, strict=True)
    return CombinedCrc(slice_bytes).join(chain.from_iterable(by_page))


def _write(file: int, content: memoryview, offset: int) -> None:
    if os.pwrite(file, content, offset) != len(content):
        raise OSError(f"the page image's bytes at {offset} were not written whole")


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
            parts = (_cast(a_name, a, virtual_V.dtype), _cast(b_name, b, virtual_V.dtype))
            _write_rows(virtual_V, layout, name, offsets[name], parts)


def _cast(name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    """`cast_finite` of values that are finite as they are."""
    return values if values.dtype == dtype else cast_finite(name, values, dtype)


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
