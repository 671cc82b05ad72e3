import itertools
import math
from dataclasses import replace

import pytest
import torch

from lorry.kernels.lora import LoraWeights
from lorry.kernels.lora_expand import DEALT_COLUMNS, lora_expand_add
from lorry.kernels.lora_plan import LoraSetting, allocate_lora_work, plan_lora
from lorry.kernels.page_layout import GROUPS, MODULES, QKV, PageLayout, TpStrategy
from tests.support.kernel_cases import (
    DTYPES,
    LAYER,
    MIXED_ADAPTERS,
    Adapter,
    geometry,
    layout_of,
    mixes,
    store_adapters,
)
from tests.support.kernel_checks import check_lora

SETTING = LoraSetting(
    tile_rows=4,
    shrink_ranks=16,
    shrink_splits=3,
    shrink_programs_per_multiprocessor=2,
    shrink_warps=4,
    shrink_stages=1,
    expand_ranks=16,
    expand_columns=32,
    expand_programs_per_multiprocessor=2,
    expand_warps=2,
    expand_stages=1,
)
MIXES = mixes(13, len(MIXED_ADAPTERS) - 1)


@pytest.mark.parametrize("mix", MIXES)
def test_lora_of_mixed_ranks_and_targets_matches_the_reference(device, mix):
    pool, tables = store_adapters(MIXED_ADAPTERS[:-1], layout_of("tiny", torch.float32), device)
    check_lora(MIXES[mix], pool, tables, SETTING)


def test_lora_in_half_precision_matches_the_reference(device):
    pool, tables = store_adapters(MIXED_ADAPTERS[:-1], layout_of("tiny", torch.float16), device)
    check_lora([0, 0, 0, 1, -1, 2, 2, 3], pool, tables, SETTING, groups=(0, 3))


def test_lora_of_the_largest_rank_matches_the_reference(device):
    pool, tables = store_adapters(MIXED_ADAPTERS, layout_of("tiny", torch.float32), device)
    check_lora([4, 4, 0, 4], pool, tables, SETTING, groups=(1,))


@pytest.mark.parametrize(("name", "tp_size"), [("qwen2.5-0.5b", 1), ("qwen2.5-0.5b", 8)])
def test_lora_of_odd_widths_matches_the_reference(device, name, tp_size):
    adapters = (Adapter(MODULES, 3), Adapter(("q_proj", "v_proj", "down_proj"), 17))
    pool, tables = store_adapters(adapters, layout_of(name, torch.float32, tp_size), device)
    setting = replace(SETTING, shrink_splits=1)
    check_lora([0, 1, 1], pool, tables, setting, groups=(0,))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_expand_of_dealt_ranks_stays_in_narrow_row_units(device, num_rows):
    """Of rows of A that lie on two ranks, with settings that allow wider pieces than a row unit."""
    size, rank = 2, 5
    layout = PageLayout(
        geometry=geometry(192, 8, 4, 32, 320),
        dtype=DTYPES[torch.float16],
        tp_size=size,
        tp_strategy=TpStrategy.SLORA,
    )
    setting = replace(SETTING, expand_columns=256)
    widths = layout.local_geometry.group_widths(QKV)
    assert layout.row_unit < min(setting.expand_columns, DEALT_COLUMNS, widths[0])
    pool, tables = store_adapters((Adapter(MODULES, rank),), layout, device)
    work = allocate_lora_work(setting, layout, max_rows=num_rows, device=device)
    plan_lora(torch.zeros(num_rows, dtype=torch.int32, device=device), tables, work)
    y_MTR = torch.randn(len(widths), num_rows, rank, device=device).half().float()
    rows_of_a = layout.a_rows("q_proj", rank)
    y_NTY = torch.zeros(size, num_rows, len(widths) * rows_of_a, device=device)
    for number, row in itertools.product(range(len(widths)), range(rank)):
        y_NTY[row % size, :, number * rows_of_a + row // size] = y_MTR[number, :, row]
    outputs = [torch.zeros(num_rows, width, dtype=torch.float16, device=device) for width in widths]
    lora_expand_add(outputs, QKV, pool, tables, LAYER, work, y_NTY)
    for module, output, y_TR in zip(GROUPS[QKV], outputs, y_MTR, strict=True):
        weights = LoraWeights(pool, tables, LAYER, module, torch.zeros(1, dtype=torch.int64))
        scale = tables.scale_SLX[0, LAYER, MODULES.index(module)]
        expected = weights.expand(y_TR[None], output.shape[1])[0] * scale
        torch.testing.assert_close(output.float(), expected, atol=2e-3, rtol=2e-3)


def test_lora_whose_rows_of_a_lie_in_many_pages_matches_the_reference(device):
    layout = PageLayout(geometry=geometry(64, 2, 1, 16, 2048), dtype=DTYPES[torch.float32])
    steps = math.ceil(2048 / layout.row_unit / SETTING.shrink_splits)
    assert steps > layout.slice_units + 1
    pool, tables = store_adapters((Adapter(MODULES, 3), Adapter(MODULES, 17)), layout, device)
    check_lora([0, 1, 1], pool, tables, SETTING, groups=(3,))


def test_only_present_modules_and_ranks_become_work(device):
    layout = layout_of("tiny", torch.float32)
    _, tables = store_adapters(MIXED_ADAPTERS, layout, device)
    work = allocate_lora_work(SETTING, layout, max_rows=16, device=device)

    def planned(slots):
        plan_lora(torch.tensor(slots, dtype=torch.int32), tables, work)
        return work.count_G2.tolist()

    assert planned([-1, -1, -1]) == [[0, 0]] * len(GROUPS)
    q, v, o = (units // layout.row_unit for units in (192, 64, 192))
    matrix, vector = q + v, -(-q // 2) + -(-v // 2)  # two row units for a row alone
    assert planned([1, -1]) == [[2, vector], [0, 0], [0, 0], [0, 0]]
    assert planned([1] * 5) == [[4, matrix + vector], [0, 0], [0, 0], [0, 0]]
    assert planned([3, 3, -1, 3])[1] == [2, o + -(-o // 2)]


def test_a_step_larger_than_the_work_list_is_refused(device):
    layout = layout_of("tiny", torch.float32)
    _, tables = store_adapters(MIXED_ADAPTERS[:1], layout, device)
    work = allocate_lora_work(SETTING, layout, max_rows=4, device=device)
    with pytest.raises(ValueError, match="5 rows exceed the 4"):
        plan_lora(torch.zeros(5, dtype=torch.int32), tables, work)
