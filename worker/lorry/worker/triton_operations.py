"""The operations of a step by Triton kernels over the step buffers of a bucket."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import linear

from lorry.kernels.activation import swiglu
from lorry.kernels.attention_plan import (
    AttentionSetting,
    AttentionWork,
    allocate_attention_work,
    plan_attention,
)
from lorry.kernels.launch_settings import LORA, decode_setting, lora_setting, prefill_setting
from lorry.kernels.lora import AdapterTables
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_plan import LoraWork, allocate_lora_work, plan_lora
from lorry.kernels.lora_shrink import lora_shrink
from lorry.kernels.norm import add_rms_norm, rms_norm
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.rope import QkNorm, rope_write_kv
from lorry.rpc.model_families import DecoderOptions
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.operations import HeadNorms, Projection
from lorry.worker.side_stream import IN_ORDER, SideStream

# A shrink of more rows fills the multiprocessors by itself and only delays the product.
MAX_ROWS_BESIDE_PRODUCT = 64


@dataclass(frozen=True, slots=True)
class AttentionWorks:
    """Work lists for the rows that decode and for those of prompts."""

    decode: AttentionWork
    prefill: AttentionWork


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What all steps share on the device."""

    pool: PoolView
    tables: AdapterTables
    block_table_RP: torch.Tensor  # int32, by row of the sequence table
    cos_sin_L2D: torch.Tensor
    options: DecoderOptions
    attention_works: Mapping[int | None, AttentionWorks]  # by the layers' windows
    lora_works: Sequence[LoraWork]  # by ascending max_rows
    side: SideStream

    def lora_work(self, rows: int) -> LoraWork:
        """The one that was tuned for steps of `rows` rows."""
        return next(work for work in self.lora_works if rows <= work.max_rows)


def allocate_device_state(
    pool: PoolView,
    tables: AdapterTables,
    block_table_RP: torch.Tensor,
    cos_sin_L2D: torch.Tensor,
    options: DecoderOptions,
    *,
    max_rows: int,
) -> DeviceState:
    """Work lists for steps of up to `max_rows` rows."""
    geometry, device = pool.layout.local_geometry, pool.slices.device
    dtype, group = TORCH_DTYPES[pool.layout.dtype], geometry.heads // geometry.kv_heads

    def work(setting: AttentionSetting, window: int | None) -> AttentionWork:
        return allocate_attention_work(
            setting,
            max_rows=max_rows,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            device=device,
            window=window,
        )

    return DeviceState(
        pool=pool,
        tables=tables,
        block_table_RP=block_table_RP,
        cos_sin_L2D=cos_sin_L2D,
        options=options,
        attention_works={
            window: AttentionWorks(
                decode=work(decode_setting(dtype, group), window),
                prefill=work(prefill_setting(dtype, group), window),
            )
            for window in dict.fromkeys(options.windows)
        },
        lora_works=[
            allocate_lora_work(lora_setting(dtype, rows), pool.layout, max_rows=rows, device=device)
            for rows in sorted({min(limit, max_rows) for limit in LORA})
        ],
        side=SideStream(device),
    )


class TritonOperations:
    """See `Operations`. The constructor plans the step's work lists on the device."""

    def __init__(
        self,
        state: DeviceState,
        *,
        position_T: torch.Tensor,
        page_T: torch.Tensor,
        sequence_T: torch.Tensor,
        slot_T: torch.Tensor,
        groups: LoraGroups,
    ) -> None:
        self._state = state
        self._position_T = position_T
        self._page_T = page_T
        for works in state.attention_works.values():
            plan_attention(sequence_T, position_T, works.decode, max_run=1)
            plan_attention(sequence_T, position_T, works.prefill, min_run=2)
        self._groups = groups.value
        self._lora_work = state.lora_work(len(slot_T))
        if self._groups:
            plan_lora(slot_T, state.tables, self._lora_work)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        out_TH = torch.empty_like(x_TH)
        rms_norm(x_TH, weight_H, self._state.options.norm_epsilon, out_TH)
        return out_TH

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        add_rms_norm(x_TH, residual_TH, weight_H, self._state.options.norm_epsilon, x_TH)
        return x_TH, residual_TH

    def rope_write_kv(
        self,
        q_TQD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        norms: HeadNorms | None,
        layer: int,
    ) -> torch.Tensor:
        state = self._state
        rope_write_kv(
            q_TQD,
            k_TKD,
            v_TKD,
            state.cos_sin_L2D,
            self._position_T,
            self._page_T,
            state.pool,
            layer,
            norms and QkNorm(*norms, state.options.norm_epsilon),
        )
        return q_TQD

    def attention(self, q_TQD: torch.Tensor, layer: int) -> torch.Tensor:
        state = self._state
        out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
        works = state.attention_works[state.options.windows[layer]]
        attend = partial(paged_attention, q_TQD, state.pool, layer, state.block_table_RP)
        with state.side.forked():
            attend(works.prefill, out_TQD)
        attend(works.decode, out_TQD)
        state.side.join()
        return out_TQD

    def project(
        self, x_TI: torch.Tensor, base: Projection, group: int, layer: int
    ) -> Sequence[torch.Tensor]:
        state, work = self._state, self._lora_work
        widths = state.pool.layout.local_geometry.group_widths(group)
        if group not in self._groups:
            return torch.split(linear(x_TI, *base), widths, dim=1)
        side = state.side if len(x_TI) <= MAX_ROWS_BESIDE_PRODUCT else IN_ORDER
        with side.forked():
            y_STY = lora_shrink(x_TI, group, state.pool, state.tables, layer, work)
        outputs = torch.split(linear(x_TI, *base), widths, dim=1)
        side.join()
        lora_expand_add(outputs, group, state.pool, state.tables, layer, work, y_STY)
        return outputs

    def swiglu(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        out_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
        swiglu(gate_TI, up_TI, out_TI)
        return out_TI
