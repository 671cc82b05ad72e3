"""Compile every shipped launch setting for sm_90 and print what each kernel takes, as JSON.

Run as a module without TRITON_INTERPRET, whose kernels cannot be compiled.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from lorry.kernels import activation, adjustments, logprobs, norm, rope, sampling, truncation
from lorry.kernels.attention_plan import AttentionSetting, allocate_attention_work, plan_attention
from lorry.kernels.invariant_attention import split_attention
from lorry.kernels.invariant_product import invariant_product
from lorry.kernels.launch_settings import (
    LORA,
    SMALL_ROWS,
    decode_setting,
    invariant_lora_setting,
    lora_setting,
    prefill_setting,
    product_setting,
    small_setting,
    split_setting,
)
from lorry.kernels.lora import AdapterTables
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_expand_rope import expand_rope_write_kv
from lorry.kernels.lora_plan import LoraSetting, allocate_lora_work, plan_lora
from lorry.kernels.lora_shrink import lora_shrink
from lorry.kernels.page_layout import GROUPS, MAX_RANK, MODULES, QKV, TpStrategy
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.pool_view import allocate_pool
from lorry.kernels.rank_sum import sum_add_rms_norm
from lorry.kernels.small_attention import small_attention
from lorry.kernels.small_parts import allocate_small_work
from lorry.kernels.split_plan import allocate_partials, allocate_split_work, plan_splits
from lorry.worker.row_sums import open_rooms, rooms_bytes
from tests.support.kernel_cases import LAYERS, layout_of
from tests.support.sm90 import compiling

DEVICE = torch.device("meta")
MAX_ROWS = 1024
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ATTENTION_MODELS = [
    ("llama-2-7b", BF16),
    ("llama-3-8b", BF16),
    ("llama-3-8b", FP16),
    ("llama-3-8b", FP32),
    ("llama-70b", BF16),
    ("qwen2.5-0.5b", BF16),
]


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def attend(
    model: str, dtype: torch.dtype, setting: AttentionSetting, window: int | None = None
) -> None:
    layout = layout_of(model, dtype)
    shape = layout.geometry
    work = allocate_attention_work(
        setting,
        max_rows=MAX_ROWS,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=DEVICE,
        window=window,
    )
    row = empty(MAX_ROWS)
    q = empty(MAX_ROWS, shape.heads, shape.head_dim, dtype=dtype)
    plan_attention(row, row, work)
    paged_attention(q, allocate_pool(64, layout, DEVICE), 1, empty(512, 256), work, q)


def attend_small(model: str, dtype: torch.dtype, rows: int, window: int | None = None) -> None:
    layout = layout_of(model, dtype)
    shape = layout.geometry
    work = allocate_small_work(
        small_setting(dtype, shape.heads // shape.kv_heads),
        max_rows=SMALL_ROWS,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=DEVICE,
        window=window,
    )
    row = empty(rows)
    q = empty(rows, shape.heads, shape.head_dim, dtype=dtype)
    pool = allocate_pool(64, layout, DEVICE)
    small_attention(q, pool, 1, empty(512, 256), row, row, work, q)


def attend_splits(model: str, dtype: torch.dtype, window: int | None = None) -> None:
    layout = layout_of(model, dtype)
    shape = layout.geometry
    setting = split_setting(dtype, shape.heads // shape.kv_heads)
    partials = allocate_partials(
        setting, max_rows=MAX_ROWS, heads=shape.heads, head_dim=shape.head_dim, device=DEVICE
    )
    work = allocate_split_work(setting, partials, kv_heads=shape.kv_heads, window=window)
    row = empty(MAX_ROWS)
    q = empty(MAX_ROWS, shape.heads, shape.head_dim, dtype=dtype)
    plan_splits(row, row, work)
    pool = allocate_pool(64, layout, DEVICE)
    split_attention(q, pool, 1, empty(512, 256), row, row, work, q)


def multiply(dtype: torch.dtype, outputs: int, *, has_bias: bool = False) -> None:
    x_TI, weight_OI = empty(64, 4096, dtype=dtype), empty(outputs, 4096, dtype=dtype)
    bias_O = empty(outputs, dtype=dtype) if has_bias else None
    invariant_product(x_TI, weight_OI, bias_O, product_setting(dtype, outputs))


def adapt(
    dtype: torch.dtype, setting: LoraSetting, rows: int, group: int, *, is_shared: bool = False
) -> None:
    """With rows of A dealt out over two tensor-parallel ranks where `is_shared`."""
    layout = layout_of("llama-3-8b", dtype)
    if is_shared:
        layout = dataclasses.replace(layout, tp_size=2, tp_strategy=TpStrategy.SLORA)
    pool = allocate_pool(64, layout, DEVICE)
    tables = adapter_tables()
    work = allocate_lora_work(setting, layout, max_rows=rows, device=DEVICE)
    plan_lora(empty(rows), tables, work)
    shapes = [layout.local_geometry.module_shape(module) for module in GROUPS[group]]
    x_TI = empty(rows, shapes[0][0], dtype=dtype)
    outputs = [empty(rows, output, dtype=dtype) for _, output in shapes]
    y_STY = lora_shrink(x_TI, group, pool, tables, 1, work)
    if is_shared:
        y_STY = empty(layout.tp_size, rows, 3 * MAX_RANK // 2, dtype=FP32)
    lora_expand_add(outputs, group, pool, tables, 1, work, y_STY)


def expand_and_rotate(model: str, dtype: torch.dtype, setting: LoraSetting, rows: int) -> None:
    layout = layout_of(model, dtype)
    geometry, pool = layout.geometry, allocate_pool(64, layout, DEVICE)
    work = allocate_lora_work(setting, layout, max_rows=rows, device=DEVICE, rotates=True)
    tables = adapter_tables()
    plan_lora(empty(rows), tables, work)
    qkv_TO = empty(rows, sum(geometry.group_widths(QKV)), dtype=dtype)
    step = (empty(8192, 2, geometry.head_dim, dtype=dtype), empty(rows), empty(rows))
    y_STY = work.partial_sums(rows, geometry.hidden)
    expand_rope_write_kv(qkv_TO, *step, pool, tables, 1, work, y_STY)


def adapter_tables() -> AdapterTables:
    return AdapterTables(
        empty(64, 640),
        empty(64),
        empty(64, len(MODULES)),
        empty(64, len(MODULES)),
        empty(64, LAYERS, len(MODULES), dtype=FP32),
    )


def rows_of_8b() -> None:
    layout = layout_of("llama-3-8b", BF16)
    shape = layout.geometry
    x_TH, weight_H = empty(64, shape.hidden, dtype=BF16), empty(shape.hidden, dtype=BF16)
    norm.rms_norm(x_TH, weight_H, 1e-5, x_TH)
    norm.add_rms_norm(x_TH, x_TH, weight_H, 1e-5, x_TH)
    gate_TI = empty(64, shape.intermediate, dtype=BF16)
    activation.swiglu(gate_TI, gate_TI, gate_TI)
    q, k, v = empty(64, 48, 128, dtype=BF16).split([32, 8, 8], dim=1)
    table = empty(8192, 2, 128, dtype=FP32)
    pool = allocate_pool(64, layout, DEVICE)
    head = empty(128, dtype=BF16)
    for norm_of_heads in (None, rope.QkNorm(head, head, 1e-6)):
        rope.rope_write_kv(q, k, v, table, empty(64), empty(64), pool, 1, norm_of_heads)


def sum_over(ranks: int, hidden: int, dtype: torch.dtype) -> None:
    x_TH = empty(MAX_ROWS, hidden, dtype=dtype)
    memory = empty(rooms_bytes(ranks, MAX_ROWS, hidden, dtype), dtype=torch.uint8)
    rooms = open_rooms([memory] * ranks, 1, MAX_ROWS, hidden, dtype)
    sum_add_rms_norm(x_TH, rooms, 0, x_TH, x_TH[0], 1e-5)


def draw(dtype: torch.dtype) -> None:
    logits, long = empty(64, 128256, dtype=dtype), empty(64, dtype=torch.int64)
    number, whole = empty(64, dtype=FP32), empty(64)
    sampling.sample(logits, number, long, whole, long)
    candidate = sampling.best(logits, number, long, whole, first_id=64128)
    sampling.draw_best(candidate[None].expand(2, -1, -1), long)
    ranked = logprobs.rank(logits, whole)
    threshold = truncation.truncate(logits, number, whole, number, number)
    sampling.sample(logits, number, long, whole, long, threshold)
    out = logprobs.unpacked(logprobs.packed_logprobs(64, DEVICE))
    logprobs.write_logprobs(logits, ranked, long, whole, out)
    edits = empty(65, 300), empty(65, 300, dtype=FP32), empty(65, 128)
    tables = adjustments.SequenceTables(empty(65, 128256), *edits)
    rows = adjustments.Adjustments(long, number, number, number, whole, whole)
    adjustments.adjust(logits, tables, rows)


def shipped() -> Iterator[tuple[str, Callable[[], None]]]:
    for model, dtype in ATTENTION_MODELS:
        shape = layout_of(model, dtype).geometry
        group = shape.heads // shape.kv_heads
        yield f"decode {model} {dtype}", partial(attend, model, dtype, decode_setting(dtype, group))
        prefill = prefill_setting(dtype, group)
        yield f"prefill {model} {dtype}", partial(attend, model, dtype, prefill)
    for model, dtype in ATTENTION_MODELS:
        yield f"small {model} {dtype}", partial(attend_small, model, dtype, SMALL_ROWS)
    yield "small, one row", partial(attend_small, "llama-3-8b", BF16, 1)
    windowed = partial(attend_small, "llama-3-8b", BF16, SMALL_ROWS, window=4096)
    yield "small in a window", windowed
    for dtype, form in product((BF16, FP32), (decode_setting, prefill_setting)):
        windowed = partial(attend, "llama-3-8b", dtype, form(dtype, 4), window=4096)
        yield f"{form.__name__} {dtype} in a window", windowed
    for rows in (*[*LORA][:-1], MAX_ROWS):
        for group in (0, len(GROUPS) - 1):
            setting = lora_setting(BF16, rows)
            yield f"lora {rows} rows {GROUPS[group]}", partial(adapt, BF16, setting, rows, group)
    for model, dtype in ATTENTION_MODELS:
        yield f"splits {model} {dtype}", partial(attend_splits, model, dtype)
    windowed = partial(attend_splits, "llama-3-8b", BF16, window=4096)
    yield "splits in a window", windowed
    for dtype, outputs in product((BF16, FP16, FP32), (4096, 28672)):
        yield f"product {dtype} {outputs}", partial(multiply, dtype, outputs)
    yield "product with bias", partial(multiply, BF16, 6144, has_bias=True)
    for dtype in (BF16, FP32):
        invariant = partial(adapt, dtype, invariant_lora_setting(dtype), MAX_ROWS, 0)
        yield f"lora in one form {dtype}", invariant
    for rows in (64, MAX_ROWS):
        shared = partial(adapt, BF16, lora_setting(BF16, rows), rows, 0, is_shared=True)
        yield f"lora of two ranks, {rows} rows", shared
    for dtype, rows in ((BF16, 16), (BF16, 64), (FP16, 16), (FP16, 64), (FP32, 64)):
        rotate = partial(expand_and_rotate, "llama-3-8b", dtype, lora_setting(dtype, rows), rows)
        yield f"expand and rotate {dtype}, {rows} rows", rotate
    rotate = partial(expand_and_rotate, "qwen2.5-0.5b", BF16, lora_setting(BF16, 64), 64)
    yield "expand and rotate heads of 64", rotate
    yield "lora float32", partial(adapt, FP32, lora_setting(FP32, 64), 64, 0)
    yield "rows", rows_of_8b
    for ranks, hidden, dtype in (
        (2, 4096, BF16),
        (2, 8192, BF16),
        (8, 8192, BF16),
        (2, 4096, FP32),
    ):
        yield f"sum over {ranks} {hidden} {dtype}", partial(sum_over, ranks, hidden, dtype)
    for dtype in (BF16, FP16, FP32):
        yield f"draw {dtype}", partial(draw, dtype)


def main() -> None:
    report = []
    for name, launch in shipped():
        with compiling() as kernels:
            launch()
        report += [
            {
                "setting": name,
                "kernel": kernel.name,
                "registers": kernel.registers,
                "shared_bytes": kernel.shared_bytes,
                "local_bytes": kernel.local_bytes,
                "is_dependent": kernel.is_dependent,
                "waits_first": kernel.waits_first,
            }
            for kernel in kernels
        ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
