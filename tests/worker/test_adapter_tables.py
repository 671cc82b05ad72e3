import pytest
import torch

from lorry.kernels.lora import ABSENT, AdapterTables
from lorry.kernels.page_layout import MODULES, Dtype, ModelGeometry, PageLayout
from lorry.worker.adapter_tables import TableBuffer
from lorry.worker.messages import ImageModule, ImageReady
from lorry.worker.residency import Adapter

LAYOUT = PageLayout(
    geometry=ModelGeometry(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128),
    dtype=Dtype.FP32,
)
SLOTS = 50


@pytest.fixture
def buffer() -> TableBuffer:
    return TableBuffer(LAYOUT, num_slots=SLOTS, max_rank=8, device=torch.device("cpu"))


def adapter(slot: int, pages: list[int], rank: int, scales: dict[str, list[float]]) -> Adapter:
    """One whose offsets tell the module: 10 and 100 times its index."""
    modules = [
        ImageModule(name, 10 * MODULES.index(name), 100 * MODULES.index(name), scale)
        for name, scale in scales.items()
    ]
    image = ImageReady(b"v", "path", 0, 1, len(pages), rank, modules)
    return Adapter(b"v", image=image, pages=pages, slot=slot)


def lines(tables: AdapterTables, slot: int) -> dict[str, list[object]]:
    return {
        "pages": tables.page_SP[slot].tolist(),
        "rank": [int(tables.rank_S[slot])],
        "a": tables.a_offset_SX[slot].tolist(),
        "b": tables.b_offset_SX[slot].tolist(),
        "scales": tables.scale_SLX[slot].tolist(),
    }


def test_a_slot_says_where_its_adapter_lies(buffer: TableBuffer) -> None:
    q, down = MODULES.index("q_proj"), MODULES.index("down_proj")
    described = adapter(
        7, [41, 3, 12], 5, {"q_proj": [2.0, 0.0, 0.5], "down_proj": [1.0, 1.5, 0.0]}
    )
    buffer.write([buffer.change(described)])
    tables = buffer.tables
    assert tables.page_SP[7, :3].tolist() == [41, 3, 12]
    assert tables.rank_S[7] == 5
    assert tables.a_offset_SX[7].tolist() == [0] + [ABSENT] * 5 + [10 * down]
    assert tables.b_offset_SX[7].tolist() == [0] + [ABSENT] * 5 + [100 * down]
    assert tables.scale_SLX[7, :, q].tolist() == [2.0, 0.0, 0.5]
    assert tables.scale_SLX[7, :, down].tolist() == [1.0, 1.5, 0.0]
    assert tables.scale_SLX[7].count_nonzero() == 4


def test_slots_beside_it_stay_as_they_are(buffer: TableBuffer) -> None:
    before = [lines(buffer.tables, slot) for slot in range(SLOTS)]
    changes = [
        buffer.change(adapter(slot, [9, 8, 7], 8, {name: [1.0] * 3 for name in MODULES}))
        for slot in (0, 20, SLOTS - 1)
    ]
    buffer.write(changes)
    for slot in range(SLOTS):
        assert (lines(buffer.tables, slot) == before[slot]) == (slot not in (0, 20, SLOTS - 1))


def test_an_adapter_leaves_nothing_to_the_next_in_its_slot(buffer: TableBuffer) -> None:
    buffer.write([buffer.change(adapter(4, [1, 2], 8, {name: [3.0] * 3 for name in MODULES}))])
    successor = adapter(4, [5, 6], 2, {"o_proj": [0.5] * 3})
    buffer.write([buffer.change(successor)])
    fresh = TableBuffer(LAYOUT, num_slots=SLOTS, max_rank=8, device=torch.device("cpu"))
    fresh.write([fresh.change(successor)])
    assert lines(buffer.tables, 4) == lines(fresh.tables, 4)


def test_every_table_is_contiguous_at_an_aligned_address(buffer: TableBuffer) -> None:
    tables = buffer.tables
    for table in (tables.page_SP, tables.rank_S, tables.a_offset_SX, tables.scale_SLX):
        assert table.is_contiguous()
        assert table.data_ptr() % 64 == tables.page_SP.data_ptr() % 64
