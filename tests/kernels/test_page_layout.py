from collections.abc import Iterable, Iterator
from itertools import combinations

import pytest

from lorry.kernels.page_layout import (
    GROUPS,
    MAX_RANK,
    MODULES,
    ROW_PARALLEL,
    Dtype,
    ModelGeometry,
    PageLayout,
    TpStrategy,
)
from tests.support.kernel_cases import widths_of

GEOMETRIES = {
    "llama-2-7b": ModelGeometry(
        layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008
    ),
    "llama-3-8b": ModelGeometry(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336
    ),
    "llama-2-13b": ModelGeometry(
        layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, intermediate=13824
    ),
    "llama-30b": ModelGeometry(
        layers=60, hidden=6656, heads=52, kv_heads=52, head_dim=128, intermediate=17920
    ),
    "llama-2-70b": ModelGeometry(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, intermediate=28672
    ),
    "qwen2.5-0.5b": ModelGeometry(
        layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, intermediate=4864
    ),
    "demo": ModelGeometry(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=384),
}
PARALLEL = [(1, None), *((size, strategy) for size in (2, 4, 8) for strategy in TpStrategy)]
SUBSETS = [set(c) for n in range(1, len(MODULES) + 1) for c in combinations(MODULES, n)]


def layouts() -> Iterator[PageLayout]:
    for geometry in GEOMETRIES.values():
        for size, strategy in PARALLEL:
            yield PageLayout(
                geometry=geometry, dtype=Dtype.BF16, tp_size=size, tp_strategy=strategy
            )


def describe(layout: PageLayout) -> str:
    name = next(name for name, g in GEOMETRIES.items() if g == layout.geometry)
    return f"{name}-tp{layout.tp_size}-{layout.tp_strategy and layout.tp_strategy.value}"


@pytest.fixture(params=layouts(), ids=describe)
def layout(request: pytest.FixtureRequest) -> PageLayout:
    chosen: PageLayout = request.param
    return chosen


def intervals(layout: PageLayout, targets: Iterable[str], rank: int) -> list[tuple[int, int, str]]:
    """First and last row unit of each A and B, in the order of the virtual space."""
    found = []
    for module, offsets in layout.offsets(targets, rank).items():
        width_a, width_b = layout.row_widths(module)
        a = layout.a_rows(module, rank) * width_a // layout.row_unit
        b = rank * width_b // layout.row_unit
        found += [(offsets.a, offsets.a + a, f"{module} A"), (offsets.b, offsets.b + b, module)]
    return sorted(found)


def test_a_row_unit_divides_slices_and_rows_so_none_crosses_a_page(layout: PageLayout) -> None:
    unit = layout.row_unit
    assert unit in (64, 128, 256)
    assert layout.slice_elements % unit == 0
    for module in MODULES:
        for width in layout.row_widths(module):
            assert width % unit == 0


def test_the_row_unit_is_the_largest_that_needs_no_padding(layout: PageLayout) -> None:
    padded = any(
        width != natural
        for module in MODULES
        for width, natural in zip(layout.row_widths(module), widths_of(layout, module), strict=True)
    )
    sizes = [layout.slice_elements]
    sizes += [width for module in MODULES for width in widths_of(layout, module)]
    fitting = [u for u in (64, 128, 256) if all(size % u == 0 for size in sizes)]
    assert layout.row_unit == max(fitting, default=64)
    assert padded == (not fitting)


def test_offsets_are_dense_and_disjoint_at_every_rank(layout: PageLayout) -> None:
    for rank in range(1, MAX_RANK + 1):
        end = 0
        for first, last, _ in intervals(layout, set(MODULES), rank):
            assert first == end
            end = last
        pages = layout.pages(MODULES, rank)
        assert (pages - 1) * layout.slice_units < end <= pages * layout.slice_units


def test_absent_modules_take_no_space(layout: PageLayout) -> None:
    for targets in SUBSETS:
        for rank in (1, 7, 16, 64):
            end = 0
            for first, last, _ in intervals(layout, targets, rank):
                assert first == end
                end = last
            assert layout.offsets(targets, rank).keys() == targets


def test_modules_of_a_group_lie_side_by_side(layout: PageLayout) -> None:
    names = [name for _, _, name in intervals(layout, set(MODULES), 16)]
    expected = []
    for group in GROUPS:
        expected += [f"{module} A" for module in group] + list(group)
    assert names == expected


def test_tensor_parallel_ranks_hold_all_rows_and_columns(layout: PageLayout) -> None:
    size, geometry = layout.tp_size, layout.geometry
    for module in MODULES:
        width_in, width_out = geometry.module_shape(module)
        a, b = layout.row_widths(module)
        for rank in (1, 3, 16, 256):
            assert layout.a_rows(module, rank) * (1 if module in ROW_PARALLEL else size) >= rank
        assert a * (size if module in ROW_PARALLEL else 1) >= width_in
        assert b * size >= width_out


@pytest.mark.parametrize("rank", [0, MAX_RANK + 1])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    layout = next(layouts())
    with pytest.raises(ValueError, match="rank"):
        layout.pages(MODULES, rank)


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(ValueError, match="lm_head"):
        next(layouts()).offsets({"q_proj", "lm_head"}, 8)


def test_the_documented_slices() -> None:
    slices_bytes = {
        name: PageLayout(geometry=geometry, dtype=Dtype.BF16).slice_bytes
        for name, geometry in GEOMETRIES.items()
    }
    assert slices_bytes["llama-2-13b"] == 320 << 10
    assert slices_bytes["llama-30b"] == 416 << 10
