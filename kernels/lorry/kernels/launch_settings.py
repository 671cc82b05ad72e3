"""Launch settings as data, tuned on NVIDIA H200s (triton 3.6, bf16, 2026-11-22 and 26).

`python -m benchmarks.tune` measures the neighbours of each. A setting holds for all models: what
differs between them (heads, widths, slices) is in the kernels' constants.
"""

from dataclasses import replace
from typing import TypeVar

import torch
import triton

from lorry.kernels.attention_plan import AttentionSetting
from lorry.kernels.invariant_product import ProductSetting
from lorry.kernels.lora_plan import LoraSetting
from lorry.kernels.small_parts import SmallSetting
from lorry.kernels.split_plan import SplitSetting

Setting = TypeVar("Setting", AttentionSetting, SmallSetting, SplitSetting)

# 95 % of copy bandwidth at 1 GiB of KV with 4 programs a multiprocessor and blocks of 32 tokens in
# 5 stages; with 3 stages, which leaves one buffer, 60 %.
DECODE = AttentionSetting(
    block_rows=16,
    block_tokens=32,
    programs_per_multiprocessor=4,
    unit_cost=2,
    min_share=8,
    num_warps=4,
    num_stages=5,
    registers=128,  # left to itself, the assembler spills some to reach as few
)
PREFILL = AttentionSetting(
    block_rows=64,
    block_tokens=64,
    programs_per_multiprocessor=2,
    unit_cost=1,
    min_share=4,
    num_warps=4,
    num_stages=2,
)
# For steps of at most SMALL_ROWS rows. Up to context 4096 of one sequence a program has one block,
# whose loads are all under way at once: 40 % of copy bandwidth there, where DECODE has 22 %. With
# several stages, of which the first waits for page numbers, 36 %; at context 131072, however, 99 %
# with blocks of 128 tokens in 5 stages, where this has 87 % and DECODE 88 %.
SMALL_ROWS = 4
SMALL = SmallSetting(
    block_rows=16,
    block_tokens=128,
    programs_per_multiprocessor=2,
    merged_parts=16,
    num_warps=4,
    num_stages=1,
)
# float32 is for tests: what compiles without spills.
DECODE_FP32 = replace(
    DECODE, block_tokens=16, programs_per_multiprocessor=2, num_stages=3, registers=None
)
PREFILL_FP32 = replace(
    PREFILL, block_rows=16, block_tokens=16, programs_per_multiprocessor=2, num_stages=2
)
SMALL_FP32 = replace(SMALL, block_tokens=16)

# By the largest number of rows of a step. Tiles of 32 rows are slower, for prompts too, once a step
# has many adapters: most of their tiles are not full.
LORA = {
    16: LoraSetting(
        tile_rows=16,
        shrink_ranks=16,
        shrink_splits=16,
        shrink_programs_per_multiprocessor=8,
        shrink_warps=4,
        shrink_stages=1,
        expand_ranks=16,
        expand_columns=128,
        expand_programs_per_multiprocessor=8,
        expand_warps=2,
        expand_stages=2,
        expand_registers=128,
        rotating_registers=144,
    ),
    64: LoraSetting(
        tile_rows=16,
        shrink_ranks=16,
        shrink_splits=4,
        shrink_programs_per_multiprocessor=8,
        shrink_warps=4,
        shrink_stages=3,
        shrink_registers=128,
        expand_ranks=16,
        expand_columns=128,
        expand_programs_per_multiprocessor=8,
        expand_warps=2,
        expand_stages=1,  # with so many splits 2 would spill registers
        expand_registers=128,
        rotating_registers=144,
    ),
    1 << 30: LoraSetting(
        tile_rows=16,
        shrink_ranks=16,
        shrink_splits=2,
        shrink_programs_per_multiprocessor=8,
        shrink_warps=4,
        shrink_stages=3,
        shrink_registers=128,
        expand_ranks=16,
        expand_columns=256,
        expand_programs_per_multiprocessor=8,
        expand_warps=2,
        expand_stages=2,
        expand_registers=128,
        rotating_registers=128,
    ),
}
LORA_FP32 = replace(
    LORA[1 << 30],
    shrink_warps=8,
    shrink_stages=1,
    shrink_registers=None,
    expand_columns=32,
    expand_stages=1,
    expand_registers=None,
    rotating_registers=200,
)

# Batch-invariant, one entry for all steps: what decides how a row is summed must not follow from
# their rows. Tiles are those of decodes, where a step's bytes are; prompts are served slower.
SPLITS = SplitSetting(
    block_rows=16,
    block_tokens=32,
    split_blocks=8,
    ways=8,
    programs_per_multiprocessor=4,
    num_warps=4,
    num_stages=5,
)
SPLITS_FP32 = replace(SPLITS, block_tokens=16, programs_per_multiprocessor=2, num_stages=3)
# By the largest width of the output: narrow tiles where wide ones would leave processors idle.
PRODUCTS = {
    8192: ProductSetting(
        block_rows=64, block_outputs=64, block_inputs=64, num_warps=4, num_stages=5
    ),
    1 << 30: ProductSetting(
        block_rows=64, block_outputs=128, block_inputs=64, num_warps=4, num_stages=4
    ),
}
PRODUCT_FP32 = ProductSetting(
    block_rows=16, block_outputs=64, block_inputs=32, num_warps=4, num_stages=2
)


def decode_setting(dtype: torch.dtype, group: int) -> AttentionSetting:
    """For runs of few rows; `group` is the number of query heads of a KV head."""
    return _for_group(DECODE_FP32 if dtype == torch.float32 else DECODE, group)


def prefill_setting(dtype: torch.dtype, group: int) -> AttentionSetting:
    """For runs of many rows."""
    return _for_group(PREFILL_FP32 if dtype == torch.float32 else PREFILL, group)


def small_setting(dtype: torch.dtype, group: int) -> SmallSetting:
    """For steps of at most `SMALL_ROWS` rows."""
    return _for_group(SMALL_FP32 if dtype == torch.float32 else SMALL, group)


def lora_setting(dtype: torch.dtype, max_rows: int) -> LoraSetting:
    """For steps of at most `max_rows` rows."""
    if dtype == torch.float32:
        return LORA_FP32
    return next(setting for rows, setting in LORA.items() if max_rows <= rows)


def invariant_lora_setting(dtype: torch.dtype) -> LoraSetting:
    """For all steps. The matrix form alone would spill within the registers of both."""
    return replace(
        lora_setting(dtype, max(LORA)),
        has_vector_form=False,
        shrink_registers=None,
    )


def split_setting(dtype: torch.dtype, group: int) -> SplitSetting:
    """For all steps."""
    return _for_group(SPLITS_FP32 if dtype == torch.float32 else SPLITS, group)


def product_setting(dtype: torch.dtype, outputs: int) -> ProductSetting:
    """For products of any number of rows."""
    if dtype == torch.float32:
        return PRODUCT_FP32
    return next(setting for most, setting in PRODUCTS.items() if outputs <= most)


def _for_group(setting: Setting, group: int) -> Setting:
    """With a row for each query head of a KV head."""
    return replace(setting, block_rows=max(setting.block_rows, triton.next_power_of_2(group)))
