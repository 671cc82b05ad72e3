"""Measure the neighbours of the shipped launch settings and print the best of each case."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernel_attention import CASES as ATTENTION_CASES
from benchmarks.kernel_attention import AttentionCase, measure_attention
from benchmarks.kernel_cases import Device, open_device
from benchmarks.kernel_lora import CASES as LORA_CASES
from benchmarks.kernel_lora import QKV, LoraBench, LoraCase
from lorry.kernels.attention_plan import AttentionSetting
from lorry.kernels.launch_settings import DECODE, PREFILL, SMALL, lora_setting
from lorry.kernels.small_parts import SmallSetting

POOL_BYTES = 60 << 30
SHOWN = 6
Changes = dict[str, Iterable[Any]]
DECODE_CHANGES: Changes = {
    "block_tokens": (32, 64),
    "programs_per_multiprocessor": (3, 4, 5),
    "unit_cost": (1, 2, 3),
    "num_stages": (5, 7),
}
SMALL_CHANGES: Changes = {
    "block_tokens": (64, 128, 256),
    "programs_per_multiprocessor": (1, 2, 4),
    "num_warps": (4, 8),
    "num_stages": (1, 5),
}
PREFILL_CHANGES: Changes = {
    "block_rows": (64, 128),
    "block_tokens": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
}
SHRINK_CHANGES: Changes = {
    "shrink_splits": (2, 4, 8),
    "shrink_programs_per_multiprocessor": (4, 8),
    "shrink_stages": (1, 3, 4),
    "shrink_registers": (None, 128),
}
EXPAND_CHANGES: Changes = {
    "expand_ranks": (16, 32),
    "expand_columns": (32, 64, 256),
    "expand_programs_per_multiprocessor": (3, 6, 8),
    "expand_warps": (1, 2, 4),
}


def tune_attention(case: AttentionCase, device: Device) -> None:
    base: AttentionSetting | SmallSetting
    if isinstance(case.setting(1), SmallSetting):
        base, changes = SMALL, SMALL_CHANGES
    else:
        base, changes = (DECODE, DECODE_CHANGES) if case.is_decode else (PREFILL, PREFILL_CHANGES)
    _tune(case.name, base, changes, lambda setting: measure_attention(case, device, setting).us)


def tune_lora(case: LoraCase, device: Device) -> None:
    base = lora_setting(torch.bfloat16, len(case.slots))

    def bench(setting: Any) -> LoraBench:
        return LoraBench(case, QKV, device, setting)

    _tune(f"{case.name} shrink", base, SHRINK_CHANGES, lambda s: bench(s).shrink().us)
    _tune(f"{case.name} expand", base, EXPAND_CHANGES, lambda s: bench(s).expand().us)


def _tune(name: str, base: Any, changes: Changes, measure: Callable[[Any], float]) -> None:
    times = []
    for values in _combinations(changes):
        try:
            times.append((measure(replace(base, **values)), values))
        except OutOfResources:
            continue
    print(f"{name}: shipped {measure(base):.1f} us")
    for us, values in sorted(times, key=lambda time: time[0])[:SHOWN]:
        print(f"    {us:8.1f} us {values}", flush=True)


def _combinations(changes: Changes) -> Iterator[dict[str, Any]]:
    for values in product(*changes.values()):
        yield dict(zip(changes, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="parts of the cases' names; default all")
    wanted = parser.parse_args().cases or [""]
    device = open_device(POOL_BYTES)
    for case in ATTENTION_CASES:
        if any(part in case.name for part in wanted):
            tune_attention(case, device)
    for lora_case in LORA_CASES:
        if any(part in lora_case.name for part in wanted):
            tune_lora(lora_case, device)


if __name__ == "__main__":
    main()
