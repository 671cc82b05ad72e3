"""LoRA shrink and expand over pages: mixes of adapters, decode and prompt segments."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.kernel_cases import Device, Measurement, adapter_tables
from benchmarks.timing import graph_us
from lorry.kernels.launch_settings import lora_setting
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_plan import LoraSetting, allocate_lora_work, plan_lora
from lorry.kernels.lora_shrink import lora_shrink
from lorry.kernels.page_layout import GROUPS, MODULES

DTYPE = torch.bfloat16
PLANS = 8  # in a graph
QKV, OUT, GATE_UP, DOWN = range(len(GROUPS))
MLP = (GATE_UP, DOWN)
GROUP_NAMES = ("qkv", "o", "gate/up", "down")


@dataclass(frozen=True, slots=True)
class LoraCase:
    """`slots` are the adapters of a step's rows, `ranks` those of the slots."""

    name: str
    model: str
    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    groups: tuple[int, ...] = (QKV, OUT)
    targets: tuple[str, ...] = MODULES[:4]

    @property
    def used_ranks(self) -> list[int]:
        return [self.ranks[slot] for slot in set(self.slots) if slot >= 0]


def spread(rows: int, adapters: int) -> tuple[int, ...]:
    """Rows in runs of equal length over the adapters."""
    return tuple(sorted(row % adapters for row in range(rows)))


def zipf(rows: int, adapters: int) -> tuple[int, ...]:
    weight = 1 / np.arange(1, adapters + 1)
    chosen = np.random.default_rng(0).choice(adapters, rows, p=weight / weight.sum())
    return tuple(sorted(chosen.tolist()))


def _case(rows: int, adapters: int, rank: int, model: str = "llama-3-8b") -> LoraCase:
    size = model[-2:].upper()
    name = f"{size} B{rows} n{adapters} r{rank}"
    return LoraCase(name, model, spread(rows, adapters), (rank,) * adapters)


CASES = (
    *(_case(64, adapters, 16) for adapters in (1, 8, 64)),
    *(_case(64, 64, rank) for rank in (8, 64)),
    *(_case(256, adapters, 16) for adapters in (1, 64, 256)),
    _case(256, 256, 64),
    _case(64, 64, 8, "llama-2-7b"),
    _case(64, 64, 16, "llama-2-7b"),
    LoraCase("8B B64 n64 r16 all", "llama-3-8b", spread(64, 64), (16,) * 64, MLP, MODULES),
    LoraCase("8B B256 zipf r16", "llama-3-8b", zipf(256, 200), (16,) * 200),
    LoraCase("7B B128 zipf r8-64", "llama-2-7b", zipf(128, 200), (8, 16, 32, 64) * 50),
    LoraCase("8B B256 none", "llama-3-8b", (-1,) * 256, (16,)),
    LoraCase("8B prompts 1024 n1 r16", "llama-3-8b", (0,) * 1024, (16,)),
    LoraCase("8B prompts 1024 n8 r64", "llama-3-8b", spread(1024, 8), (64,) * 8),
    LoraCase(
        "8B 64 decodes and prompt 512 r16",
        "llama-3-8b",
        (*range(64), *(64,) * 512),
        (16,) * 65,
    ),
    LoraCase(
        "8B 448 zipf decodes and 3 prompts r16",
        "llama-3-8b",
        tuple(sorted((*zipf(448, 1000), *(1,) * 192, *(300,) * 192, *(900,) * 192))),
        (16,) * 1000,
    ),
)


class LoraBench:
    """The operands of one group of a case; each method measures one kernel in one layer."""

    def __init__(
        self, case: LoraCase, group: int, device: Device, setting: LoraSetting | None = None
    ) -> None:
        pool = device.pools[case.model]
        shapes = [pool.layout.geometry.module_shape(module) for module in GROUPS[group]]
        rows, widths = len(case.slots), [output for _, output in shapes]
        self._name = f"{case.name} {GROUP_NAMES[group]}"
        self._group, self._pool = group, pool
        self._tables = adapter_tables(case.ranks, case.targets, pool)
        self._slot_T = torch.tensor(case.slots, dtype=torch.int32, device=device.device)
        self._x_TI = torch.randn(rows, shapes[0][0], device=device.device, dtype=DTYPE)
        self._out_TO = torch.randn(rows, sum(widths), device=device.device, dtype=DTYPE)
        self._outputs = self._out_TO.split(widths, dim=1)
        self._work = allocate_lora_work(
            setting or lora_setting(DTYPE, rows), pool.layout, max_rows=rows, device=device.device
        )
        self._work.y.normal_()
        plan_lora(self._slot_T, self._tables, self._work)
        self._adapted = sum(slot >= 0 for slot in case.slots)
        self._rank_bytes = sum(case.used_ranks) * DTYPE.itemsize
        self._in_width = sum(width for width, _ in shapes)

    def plan(self) -> Measurement:
        """Of all groups and layers of a step."""
        us = graph_us([lambda: plan_lora(self._slot_T, self._tables, self._work)] * PLANS)
        return Measurement(f"{self._name} plan", us, 0)

    def shrink(self) -> Measurement:
        def launch(layer: int) -> None:
            lora_shrink(self._x_TI, self._group, self._pool, self._tables, layer, self._work)

        num_bytes = self._rank_bytes * self._in_width + self._adapted * self._x_TI[0].nbytes
        return Measurement(f"{self._name} shrink", self._over_layers(launch), num_bytes)

    def expand(self) -> Measurement:
        y_STY = self._work.partial_sums(*self._x_TI.shape)

        def launch(layer: int) -> None:
            lora_expand_add(
                self._outputs, self._group, self._pool, self._tables, layer, self._work, y_STY
            )

        out_bytes = 2 * self._adapted * self._out_TO[0].nbytes
        num_bytes = self._rank_bytes * self._out_TO.shape[1] + out_bytes
        return Measurement(f"{self._name} expand", self._over_layers(launch), num_bytes)

    def _over_layers(self, launch: Callable[[int], None]) -> float:
        return graph_us([partial(launch, layer) for layer in range(self._pool.layers)])


def measure_all(device: Device) -> Iterator[Measurement]:
    for case in CASES:
        benches = [LoraBench(case, group, device) for group in case.groups]
        for bench in benches:
            yield bench.shrink()
            yield bench.expand()
        yield benches[0].plan()
