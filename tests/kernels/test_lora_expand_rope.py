from dataclasses import replace

import pytest
import torch

from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_expand_rope import can_expand_rope
from lorry.kernels.lora_plan import allocate_lora_work, plan_lora
from lorry.kernels.page_layout import MODULES, QKV, Dtype, ModelGeometry, PageLayout, TpStrategy
from tests.kernels.test_lora import SETTING
from tests.support.kernel_cases import MIXED_ADAPTERS, Adapter, layout_of, store_adapters
from tests.support.rotation_checks import check_expand_rope

SLOTS = {
    "decodes": [0, 1, -1, 3, 2],
    "runs and base rows": [2] * 5 + [-1] * 3,
    "a row alone": [1],
    "no adapters": [-1] * 5,
}


@pytest.mark.parametrize("rows", SLOTS)
def test_rows_match_the_reference_and_two_kernels(device, rows):
    pool, tables = store_adapters(MIXED_ADAPTERS[:-1], layout_of("tiny", torch.float32), device)
    check_expand_rope(SLOTS[rows], pool, tables, SETTING)


def test_rows_in_half_precision_match_the_reference_and_two_kernels(device):
    pool, tables = store_adapters(MIXED_ADAPTERS[:-1], layout_of("tiny", torch.float16), device)
    check_expand_rope([0, 0, -1, 1], pool, tables, SETTING)


def test_rows_of_the_largest_rank_match_the_reference_and_two_kernels(device):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("demo", torch.float32), device)
    setting = replace(SETTING, shrink_ranks=64, expand_ranks=64)
    check_expand_rope([4, 4, -1, 4], pool, tables, setting)


@pytest.mark.parametrize(("name", "tp_size"), [("qwen2.5-0.5b", 1), ("tiny", 2)])
def test_heads_that_fill_no_piece_match_the_reference_and_two_kernels(device, name, tp_size):
    adapters = (Adapter(MODULES, 3), Adapter(("q_proj", "v_proj"), 5))
    pool, tables = store_adapters(adapters, layout_of(name, torch.float32, tp_size), device)
    check_expand_rope([0, 1, 1], pool, tables, SETTING)


def test_a_plan_that_rotates_covers_every_row_and_no_other_kernel_takes_it(device):
    layout = layout_of("tiny", torch.float32)
    pool, tables = store_adapters(MIXED_ADAPTERS, layout, device)
    work = allocate_lora_work(SETTING, layout, max_rows=16, device=device, rotates=True)
    slots = [1, -1, -1, -1, -1, -1]
    plan_lora(torch.tensor(slots, dtype=torch.int32), tables, work)
    units = [width // layout.row_unit for width in (192, 64, 64)]
    vector, matrix = sum(-(-unit // 2) for unit in units), sum(units)
    # Adapter 1 has q and v; the base rows are a tile of four and one of one row.
    assert work.count_G2.tolist() == [[2, vector + matrix + vector], [0, 0], [0, 0], [0, 0]]
    outputs = torch.zeros(len(slots), 320).split([192, 64, 64], dim=1)
    with pytest.raises(AssertionError, match="expand_rope_write_kv"):
        lora_expand_add(outputs, QKV, pool, tables, 0, work, work.partial_sums(len(slots), 192))


def test_heads_cut_by_row_units_and_shared_products_are_for_two_kernels():
    geometry = ModelGeometry(
        layers=1, hidden=512, heads=4, kv_heads=2, head_dim=128, intermediate=13824
    )
    assert can_expand_rope(PageLayout(geometry=geometry, dtype=Dtype.BF16))
    for size, strategy in ((1, None), (2, TpStrategy.REPLICATED)):
        layout = PageLayout(geometry=geometry, dtype=Dtype.BF16, tp_size=size, tp_strategy=strategy)
        assert can_expand_rope(layout)
    shared = PageLayout(
        geometry=geometry, dtype=Dtype.BF16, tp_size=2, tp_strategy=TpStrategy.SLORA
    )
    assert not can_expand_rope(shared)
    cut = ModelGeometry(layers=1, hidden=512, heads=4, kv_heads=2, head_dim=128, intermediate=1728)
    assert not can_expand_rope(PageLayout(geometry=cut, dtype=Dtype.BF16))
