"""Attention over paged KV: decode batches and prompt chunks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.kernel_cases import Device, Measurement, Rows, attention_rows
from benchmarks.timing import graph_us
from lorry.kernels.attention_plan import AttentionSetting, allocate_attention_work, plan_attention
from lorry.kernels.launch_settings import (
    SMALL_ROWS,
    decode_setting,
    prefill_setting,
    small_setting,
)
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.pool_view import PoolView
from lorry.kernels.small_attention import small_attention
from lorry.kernels.small_parts import SmallSetting, allocate_small_work

DTYPE = torch.bfloat16
PLANS = 8  # in a graph


@dataclass(frozen=True, slots=True)
class AttentionCase:
    name: str
    model: str
    contexts: tuple[int, ...]
    new_tokens: int = 1
    window: int | None = None  # of cases that decode

    @property
    def is_decode(self) -> bool:
        return self.new_tokens == 1

    def setting(self, group: int) -> AttentionSetting | SmallSetting:
        """What the engine uses."""
        if len(self.contexts) * self.new_tokens <= SMALL_ROWS:
            return small_setting(DTYPE, group)
        return decode_setting(DTYPE, group) if self.is_decode else prefill_setting(DTYPE, group)


def ragged(sequences: int, mean: int) -> tuple[int, ...]:
    """Context lengths of an exponential distribution, as running requests have."""
    lengths = np.random.default_rng(0).exponential(mean, sequences)
    return tuple(np.maximum(1, lengths).astype(int).tolist())


CASES = (
    AttentionCase("8B B256 ctx1024", "llama-3-8b", (1024,) * 256),
    AttentionCase("7B B64 ctx1024", "llama-2-7b", (1024,) * 64),
    AttentionCase("7B B128 ctx256", "llama-2-7b", (256,) * 128),
    AttentionCase("8B B64 ctx512", "llama-3-8b", (512,) * 64),
    AttentionCase("8B B64 ctx1024", "llama-3-8b", (1024,) * 64),
    AttentionCase("8B B1 ctx512", "llama-3-8b", (512,)),
    AttentionCase("8B B1 ctx4096", "llama-3-8b", (4096,)),
    AttentionCase("8B B1 ctx131072", "llama-3-8b", (131072,)),
    AttentionCase("8B B4 ctx1000", "llama-3-8b", (1000,) * 4),
    AttentionCase("8B B4 of one long", "llama-3-8b", (100, 16000, 50, 300)),
    AttentionCase("7B B1 ctx4096", "llama-2-7b", (4096,)),
    AttentionCase("8B B16 ctx1000", "llama-3-8b", (1000,) * 16),
    AttentionCase("8B B16 ctx8192", "llama-3-8b", (8192,) * 16),
    AttentionCase("8B B16 ctx8192, window 1024", "llama-3-8b", (8192,) * 16, window=1024),
    AttentionCase("8B B256 ragged, mean 500", "llama-3-8b", ragged(256, 500)),
    AttentionCase("8B B64 ragged, mean 512", "llama-3-8b", ragged(64, 512)),
    AttentionCase("7B B64 ragged, mean 1000", "llama-2-7b", ragged(64, 1000)),
    AttentionCase("8B prompt 1024", "llama-3-8b", (1024,), 1024),
    AttentionCase("8B 8 chunks of 128, ctx512", "llama-3-8b", (512,) * 8, 128),
    AttentionCase("8B chunk of 512, ctx4096", "llama-3-8b", (4096,), 512),
    AttentionCase("7B 4 prompts of 256", "llama-2-7b", (256,) * 4, 256),
)


def measure_attention(
    case: AttentionCase, device: Device, setting: AttentionSetting | SmallSetting | None = None
) -> Measurement:
    """Time of a layer with the layer's part of the plan, which is made once for all layers."""
    pool = device.pools[case.model]
    shape = pool.layout.geometry
    rows = attention_rows(case.contexts, pool, case.new_tokens)
    q_TQD = torch.randn(
        len(rows.sequence_T), shape.heads, shape.head_dim, device=device.device, dtype=DTYPE
    )
    setting = setting or case.setting(shape.heads // shape.kv_heads)
    if isinstance(setting, SmallSetting):
        us = _small_us(case, pool, rows, q_TQD, setting)
    else:
        us = _planned_us(case, pool, rows, q_TQD, setting)
    width = 2 * shape.kv_heads * shape.head_dim * DTYPE.itemsize
    contexts = [min(context, case.window or context) for context in case.contexts]
    num_bytes = sum(contexts) * width + 2 * q_TQD.nbytes
    seen = sum(_seen_tokens(context, case.new_tokens) for context in contexts)
    flops = 4 * seen * shape.heads * shape.head_dim
    return Measurement(case.name, us, num_bytes, flops)


def _small_us(
    case: AttentionCase, pool: PoolView, rows: Rows, q_TQD: torch.Tensor, setting: SmallSetting
) -> float:
    shape, out_TQD = pool.layout.geometry, torch.empty_like(q_TQD)
    work = allocate_small_work(
        setting,
        max_rows=len(q_TQD),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=q_TQD.device,
        window=case.window,
    )

    def attend(layer: int) -> None:
        step = (rows.sequence_T, rows.position_T)
        small_attention(q_TQD, pool, layer, rows.block_table_SP, *step, work, out_TQD)

    return graph_us([partial(attend, layer) for layer in range(shape.layers)])


def _planned_us(
    case: AttentionCase, pool: PoolView, rows: Rows, q_TQD: torch.Tensor, setting: AttentionSetting
) -> float:
    shape, out_TQD = pool.layout.geometry, torch.empty_like(q_TQD)
    work = allocate_attention_work(
        setting,
        max_rows=len(q_TQD),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=q_TQD.device,
        window=case.window,
    )

    def plan() -> None:
        plan_attention(rows.sequence_T, rows.position_T, work)

    def attend(layer: int) -> None:
        paged_attention(q_TQD, pool, layer, rows.block_table_SP, work, out_TQD)

    plan_us = graph_us([plan] * PLANS)
    us = graph_us([partial(attend, layer) for layer in range(shape.layers)])
    return us + plan_us / shape.layers


def measure_all(device: Device) -> Iterator[Measurement]:
    for case in CASES:
        yield measure_attention(case, device)


def _seen_tokens(context: int, new_tokens: int) -> int:
    """Tokens that the new rows of a sequence attend to, in all."""
    past = context - new_tokens
    return new_tokens * past + new_tokens * (new_tokens + 1) // 2
