"""LoRA of q, k and v with their rotation and the write of KV, by one kernel and otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lorry.kernels.lora import AdapterTables
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_expand_rope import expand_rope_write_kv, expand_rope_write_kv_reference
from lorry.kernels.lora_plan import LoraSetting, LoraWork, allocate_lora_work, plan_lora
from lorry.kernels.lora_shrink import lora_shrink
from lorry.kernels.page_layout import BASE_MODEL, QKV
from lorry.kernels.pool_view import PoolView
from lorry.kernels.rope import cos_sin_table, rope_write_kv
from tests.support.kernel_cases import (
    LAYER,
    TOLERANCE,
    poisoned_pool,
    precise_pool,
    relative_error,
    row_tiles,
)

POSITIONS = 5000


@dataclass(frozen=True, slots=True)
class RotatedRows:
    """Rows with the slots `slots`; each writes its KV into a page of its own."""

    slots: Sequence[int]
    pool: PoolView
    tables: AdapterTables
    x_TI: torch.Tensor
    qkv_TO: torch.Tensor
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # angles, positions and pages

    def precise(self) -> "RotatedRows":
        """The same in float32."""
        return replace(
            self,
            pool=precise_pool(self.pool),
            x_TI=self.x_TI.float(),
            qkv_TO=self.qkv_TO.float(),
        )

    def fresh(self) -> "RotatedRows":
        """With results of its own."""
        pool = PoolView(self.pool.slices.clone(), self.pool.layout)
        return replace(self, pool=pool, qkv_TO=self.qkv_TO.clone())

    def shrunk(self, setting: LoraSetting, *, rotates: bool) -> tuple[LoraWork, torch.Tensor]:
        """The products with A, NaN where there are none, and the plan they were made under."""
        slot_T = torch.tensor(self.slots, dtype=torch.int32, device=self.x_TI.device)
        work = allocate_lora_work(
            setting,
            self.pool.layout,
            max_rows=len(self.slots) + 3,
            device=slot_T.device,
            rotates=rotates,
        )
        work.y.fill_(torch.nan)
        plan_lora(slot_T, self.tables, work)
        return work, lora_shrink(self.x_TI, QKV, self.pool, self.tables, LAYER, work)


def rotated_rows(slots: Sequence[int], adapters: PoolView, tables: AdapterTables) -> RotatedRows:
    """Random rows; what those without adapter are projected from is NaN, as are unwritten pages."""
    torch.manual_seed(0)
    rows, geometry, device = len(slots), adapters.layout.local_geometry, adapters.slices.device
    pool = poisoned_pool(adapters.num_pages + rows, adapters.layout, device)
    pool.pages[: adapters.num_pages] = adapters.pages
    x_TI = torch.randn(rows, geometry.hidden).to(pool.slices)
    x_TI[torch.tensor(slots) == BASE_MODEL] = torch.nan
    table = cos_sin_table(POSITIONS, geometry.head_dim, 5e5).to(pool.slices)
    position_T = torch.randint(0, POSITIONS, (rows,), dtype=torch.int32).to(device)
    page_T = (adapters.num_pages + torch.randperm(rows, dtype=torch.int32)).to(device)
    if rows > 1:
        page_T[-1], position_T[-1] = 0, 0  # as of a padded row
    qkv_TO = torch.randn(rows, sum(geometry.group_widths(QKV))).to(pool.slices)
    return RotatedRows(slots, pool, tables, x_TI, qkv_TO, (table, position_T, page_T))


def in_one_kernel(of: RotatedRows, setting: LoraSetting) -> torch.Tensor:
    """Rotated queries; here and below, keys and values go to the pool."""
    work, y_STY = of.shrunk(setting, rotates=True)
    expand_rope_write_kv(of.qkv_TO, *of.step, of.pool, of.tables, LAYER, work, y_STY)
    geometry = of.pool.layout.local_geometry
    return of.qkv_TO.view(len(of.slots), -1, geometry.head_dim)[:, : geometry.heads]


def in_two_kernels(of: RotatedRows, setting: LoraSetting) -> torch.Tensor:
    work, y_STY = of.shrunk(setting, rotates=False)
    geometry = of.pool.layout.local_geometry
    parts = of.qkv_TO.split(geometry.group_widths(QKV), dim=1)
    lora_expand_add(parts, QKV, of.pool, of.tables, LAYER, work, y_STY)
    heads_TXD = of.qkv_TO.view(len(of.slots), -1, geometry.head_dim)
    q_TQD = heads_TXD[:, : geometry.heads]
    k_TKD, v_TKD = heads_TXD[:, geometry.heads :].chunk(2, dim=1)
    rope_write_kv(q_TQD, k_TKD, v_TKD, *of.step, of.pool, LAYER)
    return q_TQD


def by_reference(of: RotatedRows) -> torch.Tensor:
    tiles = row_tiles(of.slots, of.x_TI.device)
    return expand_rope_write_kv_reference(
        of.x_TI, of.qkv_TO, *of.step, of.pool, of.tables, LAYER, tiles
    )


def check_expand_rope(
    slots: Sequence[int], adapters: PoolView, tables: AdapterTables, setting: LoraSetting
) -> None:
    """Queries and KV near the reference's, and in half precision to the bit those of two kernels.

    In float32 compilers may fuse a multiplication with another addition.
    """
    rows = rotated_rows(slots, adapters, tables)
    one, two, precise = rows.fresh(), rows.fresh(), rows.precise()
    q_TQD, expected = in_one_kernel(one, setting), by_reference(precise)
    other_q_TQD = in_two_kernels(two, setting)
    kv, other_kv, expected_kv = (of.pool.pages[adapters.num_pages :] for of in (one, two, precise))
    written = ~expected_kv.isnan()
    assert torch.equal(~kv.isnan(), written)
    _check(q_TQD, other_q_TQD, expected)
    _check(kv[written], other_kv[written], expected_kv[written])
    kept = slice(1, adapters.num_pages)
    assert torch.equal(one.pool.pages[kept].nan_to_num(), adapters.pages[kept].nan_to_num())


def _check(actual: torch.Tensor, other: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    assert relative_error(actual, expected) < tolerance
    if actual.dtype == torch.float32:
        assert relative_error(actual, other) < tolerance
    else:
        assert torch.equal(actual, other)
