"""Images are read back element by element, by nothing but the addresses of page_layout."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from lorry.adapter_store.image import NUMPY_DTYPES, ImageHeader
from lorry.adapter_store.lora import tensor_names
from lorry.kernels.page_layout import MODULES, Dtype, PageLayout, TpStrategy
from lorry.rpc.errors import AdapterIncompatible
from tests.support.adapters import TINY, build_image, lora_config, lora_tensors

LAYOUT = PageLayout(geometry=TINY, dtype=Dtype.FP32)
CONFIGS = {
    "q and v": lora_config(r=8),
    "all seven of rank 1": lora_config(r=1, targets=MODULES),
    "rank 256": lora_config(r=256, targets=("o_proj", "down_proj")),
    "odd rank": lora_config(r=3, targets=MODULES),
    "one module": lora_config(r=5, targets=("gate_proj",)),
    "rank_pattern": lora_config(
        r=4, targets=MODULES, rank_pattern={"mlp.down_proj": 16, r"layers\.1\..*q_proj": 2}
    ),
    "layers_to_transform": lora_config(r=4, layers_to_transform=[0, 2]),
}


class ImageReader:
    """Addresses single elements of an image as a kernel would."""

    def __init__(self, layout: PageLayout, header: ImageHeader, image: bytearray) -> None:
        self.layout, self.header = layout, header
        self.elements = np.frombuffer(image, NUMPY_DTYPES[layout.dtype])
        self.seen = np.zeros(self.elements.size, bool)

    def row(self, layer: int, first: int, width: int) -> NDArray[Any]:
        """`width` elements of a layer's virtual space."""
        layout = self.layout
        virtual = first + np.arange(width)
        page, inner = np.divmod(virtual, layout.slice_elements)
        address = (page * layout.geometry.layers + layer) * layout.slice_elements + inner
        self.seen[address] = True
        values: NDArray[Any] = self.elements[address]
        return values

    def matrix_pair(self, layer: int, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B of the module at `index` of the header, as far as this rank holds them."""
        module, unit = self.header.modules[index], self.layout.row_unit
        width_a, width_b = self.layout.row_widths(module.name)
        rows_a = self.layout.a_rows(module.name, self.header.rank)
        first_a, first_b = module.row_offset * unit, module.b_row_offset * unit
        a = self.row(layer, first_a, rows_a * width_a).reshape(rows_a, width_a)
        b = self.row(layer, first_b, self.header.rank * width_b).reshape(-1, width_b)
        return a, b.T

    def matrices(self, layer: int) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
        """A and B of each module in the shapes of PEFT, with rows up to the adapter's rank."""
        for index, module in enumerate(self.header.modules):
            yield module.name, *self.matrix_pair(layer, index)


def assert_holds(image: ImageReader, tensors: dict[str, NDArray[Any]]) -> None:
    for layer in range(image.layout.geometry.layers):
        for module, a, b in image.matrices(layer):
            a_name, b_name = tensor_names(layer, module)
            width_in, width_out = image.layout.geometry.module_shape(module)
            expected_a = tensors.get(a_name, np.zeros((0, width_in), a.dtype))
            expected_b = tensors.get(b_name, np.zeros((width_out, 0), b.dtype))
            rank = len(expected_a)
            np.testing.assert_array_equal(a[:rank, :width_in], expected_a.astype(a.dtype))
            np.testing.assert_array_equal(b[:width_out, :rank], expected_b.astype(b.dtype))
            assert not a[rank:].any()
            assert not a[:, width_in:].any()
            assert not b[:, rank:].any()
            assert not b[width_out:].any()
    assert not image.elements[~image.seen].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_lies_at_its_address_and_the_rest_is_zero(name: str) -> None:
    config = CONFIGS[name]
    tensors = lora_tensors(config)
    header, image = build_image(config, tensors, LAYOUT)
    assert_holds(ImageReader(LAYOUT, header, image), tensors)
    assert len(image) == header.image_bytes == header.pages * LAYOUT.page_bytes
    assert header.crc32c == crc32c(image)
    present = {module.name for module in header.modules}
    assert [module.name for module in header.modules] == [m for m in MODULES if m in present]


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("source", [np.float32, np.float16, bfloat16])
def test_weights_are_rounded_once_to_the_layouts_dtype(dtype: Dtype, source: type[Any]) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    config = lora_config(r=4, targets=MODULES)
    tensors = lora_tensors(config, dtype=source)
    header, image = build_image(config, tensors, layout)
    assert_holds(ImageReader(layout, header, image), tensors)


def test_rows_that_no_unit_divides_are_padded_with_zeros() -> None:
    geometry = replace(TINY, hidden=96, intermediate=200)
    layout = PageLayout(geometry=geometry, dtype=Dtype.FP32)
    config = lora_config(r=6, targets=MODULES)
    tensors = lora_tensors(config, geometry)
    header, image = build_image(config, tensors, layout)
    assert layout.row_widths("gate_proj") == (128, 256)
    assert_holds(ImageReader(layout, header, image), tensors)


@pytest.mark.parametrize(
    ("use_rslora", "expected"),
    [(False, [12 / 4, 6 / 16, 6 / 4]), (True, [12 / 2, 6 / 4, 6 / 2])],
)
def test_the_scale_comes_from_each_modules_own_rank_and_alpha(
    use_rslora: bool, expected: list[float]
) -> None:
    config = lora_config(
        r=4,
        targets=["q_proj"],
        lora_alpha=6,
        use_rslora=use_rslora,
        alpha_pattern={r"layers\.0\..*": 12},
        rank_pattern={r"layers\.1\..*": 16},
    )
    header, _ = build_image(config, lora_tensors(config), LAYOUT)
    assert list(header.modules[0].scale_per_layer) == expected


def test_a_layer_without_the_module_has_scale_zero() -> None:
    config = lora_config(r=4, targets=["v_proj"], layers_to_transform=1)
    header, _ = build_image(config, lora_tensors(config), LAYOUT)
    assert header.modules[0].scale_per_layer == (0.0, 2.0, 0.0)


def test_a_value_that_overflows_in_the_layouts_dtype_is_refused_by_name() -> None:
    config = lora_config()
    tensors = lora_tensors(config)
    name = tensor_names(1, "v_proj")[1]
    tensors[name][3, 2] = 1e5
    build_image(config, tensors, replace(LAYOUT, dtype=Dtype.BF16))
    with pytest.raises(AdapterIncompatible, match=name):
        build_image(config, tensors, replace(LAYOUT, dtype=Dtype.FP16))


@pytest.mark.parametrize("strategy", TpStrategy)
@pytest.mark.parametrize(("size", "intermediate"), [(2, 128), (4, 130)])
@pytest.mark.parametrize("rank", [1, 3, 8, 256])
def test_the_ranks_images_hold_the_adapter_between_them(
    size: int, intermediate: int, rank: int, strategy: TpStrategy
) -> None:
    geometry = replace(TINY, intermediate=intermediate)
    config = lora_config(r=rank, targets=MODULES)
    tensors = lora_tensors(config, geometry)
    layouts = [
        PageLayout(
            geometry=geometry, dtype=Dtype.FP32, tp_size=size, tp_rank=i, tp_strategy=strategy
        )
        for i in range(size)
    ]
    images = [build_image(config, tensors, layout) for layout in layouts]
    assert len({header.modules for header, _ in images}) == 1
    assert len({(header.pages, header.image_bytes) for header, _ in images}) == 1
    readers = [ImageReader(layout, *image) for layout, image in zip(layouts, images, strict=True)]
    for layer, (index, module) in itertools.product(range(geometry.layers), enumerate(MODULES)):
        a, b = (tensors[name] for name in tensor_names(layer, module))
        for i, reader in enumerate(readers):
            local_a, local_b = reader.matrix_pair(layer, index)
            whole_a, whole_b = share_of(module, a, b, size, i, strategy)
            np.testing.assert_array_equal(local_a, padded(whole_a, local_a.shape))
            np.testing.assert_array_equal(local_b, padded(whole_b, local_b.shape))
    assert not any(reader.elements[~reader.seen].any() for reader in readers)


def share_of(
    module: str, a: NDArray[Any], b: NDArray[Any], size: int, i: int, strategy: TpStrategy
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What rank `i` of two or four holds of A and B, for four query heads and two KV heads."""
    if module in ("o_proj", "down_proj"):
        width = -(-a.shape[1] // size)
        a = a[:, i * width : (i + 1) * width]
        width = b.shape[0] // size
        return (a, b[i * width : (i + 1) * width]) if strategy is TpStrategy.SLORA else (a, b)
    if strategy is TpStrategy.SLORA:
        a = a[i::size]
    parts, part = (2, i * 2 // size) if module in ("k_proj", "v_proj") else (size, i)
    width = -(-b.shape[0] // parts)
    return a, b[part * width : (part + 1) * width]


def padded(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.pad(values, [(0, to - has) for to, has in zip(shape, values.shape, strict=True)])
