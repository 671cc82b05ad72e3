"""The expand of q, k and v with their rotation and the write of KV: by one kernel, and by two."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.kernel_cases import Device, Measurement, adapter_tables
from benchmarks.kernel_lora import CASES as LORA_CASES
from benchmarks.kernel_lora import DTYPE, LoraCase, spread
from benchmarks.timing import graph_us
from lorry.kernels.launch_settings import lora_setting
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_expand_rope import expand_rope_write_kv
from lorry.kernels.lora_plan import LoraSetting, LoraWork, allocate_lora_work, plan_lora
from lorry.kernels.page_layout import QKV
from lorry.kernels.rope import cos_sin_table, rope_write_kv

POSITIONS = 8192
CASES = (
    *(
        LoraCase(f"8B B{rows} n{rows} r{rank}", "llama-3-8b", spread(rows, rows), (rank,) * rows)
        for rows, rank in ((1, 16), (1, 64), (16, 16), (16, 64))
    ),
    LoraCase("8B B64 half base r16", "llama-3-8b", (-1,) * 32 + spread(32, 32), (16,) * 32),
    *(case for case in LORA_CASES if QKV in case.groups),
)


class RotationBench:
    """The operands of a case, in one layer after the other."""

    def __init__(self, case: LoraCase, device: Device, setting: LoraSetting | None = None) -> None:
        pool, rows = device.pools[case.model], len(case.slots)
        geometry = pool.layout.geometry
        self._case, self._pool = case, pool
        self._widths, self._head_dim = geometry.group_widths(QKV), geometry.head_dim
        self._tables = adapter_tables(case.ranks, case.targets, pool)
        self._setting = setting or lora_setting(DTYPE, rows)
        self._slot_T = torch.tensor(case.slots, dtype=torch.int32, device=device.device)
        self._qkv_TO = torch.randn(rows, sum(self._widths), device=device.device, dtype=DTYPE)
        table = cos_sin_table(POSITIONS, geometry.head_dim, 5e5).to(self._qkv_TO)
        position_T = torch.randint(0, POSITIONS, (rows,), device=device.device, dtype=torch.int32)
        page_T = torch.randperm(pool.num_pages, device=device.device)[:rows].int()
        self._step = (table, position_T, page_T)

    def in_one(self) -> Measurement:
        work = self._work(rotates=True)
        y_STY = work.partial_sums(len(self._slot_T), self._pool.layout.geometry.hidden)

        def launch(layer: int) -> None:
            expand_rope_write_kv(
                self._qkv_TO, *self._step, self._pool, self._tables, layer, work, y_STY
            )

        return self._measured("one kernel", launch)

    def in_two(self) -> Measurement:
        work = self._work(rotates=False)
        y_STY = work.partial_sums(len(self._slot_T), self._pool.layout.geometry.hidden)
        parts = self._qkv_TO.split(self._widths, dim=1)
        q, k, v = (part.view(len(part), -1, self._head_dim) for part in parts)

        def launch(layer: int) -> None:
            lora_expand_add(parts, QKV, self._pool, self._tables, layer, work, y_STY)
            rope_write_kv(q, k, v, *self._step, self._pool, layer)

        return self._measured("two kernels", launch)

    def _work(self, *, rotates: bool) -> LoraWork:
        rows, device = len(self._slot_T), self._slot_T.device
        work = allocate_lora_work(
            self._setting, self._pool.layout, max_rows=rows, device=device, rotates=rotates
        )
        work.y.normal_()
        plan_lora(self._slot_T, self._tables, work)
        return work

    def _measured(self, name: str, launch: Callable[[int], None]) -> Measurement:
        us = graph_us([partial(launch, layer) for layer in range(self._pool.layers)])
        rank_bytes = sum(self._case.used_ranks) * DTYPE.itemsize * sum(self._widths)
        num_bytes = rank_bytes + 2 * self._qkv_TO.nbytes
        return Measurement(f"{self._case.name} expand + RoPE, {name}", us, num_bytes)


def measure_all(device: Device) -> Iterator[Measurement]:
    for case in CASES:
        bench = RotationBench(case, device)
        yield bench.in_two()
        yield bench.in_one()
