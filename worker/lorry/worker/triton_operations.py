"""The operations of a step by Triton kernels over the step buffers of a bucket."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lorry.kernels.activation import swiglu
from lorry.kernels.launch_settings import LORA, invariant_lora_setting, lora_setting
from lorry.kernels.lora import AdapterTables
from lorry.kernels.lora_expand import lora_expand_add
from lorry.kernels.lora_expand_rope import can_expand_rope, expand_rope_write_kv
from lorry.kernels.lora_plan import LoraWork, allocate_lora_work, plan_lora
from lorry.kernels.lora_shrink import lora_shrink
from lorry.kernels.norm import add_rms_norm, rms_norm
from lorry.kernels.page_layout import QKV
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.rope import QkNorm, rope_write_kv
from lorry.rpc.model_families import DecoderOptions
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.lora_sharing import LoraSharing
from lorry.worker.operations import HeadNorms, Product, Projection
from lorry.worker.products import fastest_linear, invariant_linear
from lorry.worker.side_stream import IN_ORDER, SideStream
from lorry.worker.step_attention import (
    AttendedRows,
    CachedSequences,
    StepAttention,
    balanced_attention,
    invariant_attention,
)

# Steps of more rows leave the shrink no multiprocessors beside the product.
ROWS_BESIDE_PRODUCT = 256
# Up to so many, the shrink is so short that it is launched before the product.
ROWS_BEFORE_PRODUCT = 96


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What all steps share on the device."""

    pool: PoolView
    tables: AdapterTables
    cos_sin_L2D: torch.Tensor
    options: DecoderOptions
    attention: Mapping[int | None, StepAttention]  # by the layers' windows
    lora: LoraSharing
    lora_works: Sequence[LoraWork]  # by ascending max_rows
    side: SideStream
    product: Product

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
    lora: LoraSharing,
    max_rows: int,
    batch_invariant: bool = False,
    fused: bool = True,
) -> DeviceState:
    """Work lists for steps of up to `max_rows` rows.

    `block_table_RP` (int32) is by row of the sequence table. `fused` steps add LoRA to q, k and v
    and rotate them in one kernel, where the model lets them.
    """
    cached, windows = CachedSequences(pool, block_table_RP), options.windows
    dtype, device = TORCH_DTYPES[pool.layout.dtype], pool.slices.device
    side = SideStream(device)
    if batch_invariant:
        attention = invariant_attention(cached, windows, max_rows=max_rows)
        settings = {max_rows: invariant_lora_setting(dtype)}
        rotates, product = False, invariant_linear
    else:
        attention = balanced_attention(cached, windows, side, max_rows=max_rows)
        limits = sorted({min(limit, max_rows) for limit in LORA})
        settings = {rows: lora_setting(dtype, rows) for rows in limits}
        rotates = fused and not options.qk_norm and can_expand_rope(pool.layout)
        product = fastest_linear(device, dtype)
    return DeviceState(
        pool=pool,
        tables=tables,
        cos_sin_L2D=cos_sin_L2D,
        options=options,
        attention=attention,
        lora=lora,
        lora_works=[
            allocate_lora_work(setting, pool.layout, max_rows=rows, device=device, rotates=rotates)
            for rows, setting in settings.items()
        ],
        side=side,
        product=product,
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
        self._attended = AttendedRows(sequence_T, position_T)
        for attention in state.attention.values():
            attention.plan(self._attended)
        self._groups = groups.value
        self._lora_work = state.lora_work(len(slot_T))
        if self._groups:
            plan_lora(slot_T, state.tables, self._lora_work)
        self._expand_rotates = bool(self._groups) and self._lora_work.rotates

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        out_TH = torch.empty_like(x_TH)
        rms_norm(x_TH, weight_H, self._state.options.norm_epsilon, out_TH)
        return out_TH

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        add_rms_norm(x_TH, residual_TH, weight_H, self._state.options.norm_epsilon, x_TH)
        return x_TH, residual_TH

    def project_qkv(
        self, x_TI: torch.Tensor, base: Projection, norms: HeadNorms | None, layer: int
    ) -> torch.Tensor:
        if self._expand_rotates:
            return self._project_rotating(x_TI, base, layer)
        state, head_dim = self._state, self._state.pool.layout.geometry.head_dim
        q_TQD, k_TKD, v_TKD = (
            part.view(len(part), -1, head_dim) for part in self.project(x_TI, base, QKV, layer)
        )
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

    def _project_rotating(self, x_TI: torch.Tensor, base: Projection, layer: int) -> torch.Tensor:
        """`project_qkv` of rows that may have adapters, without head norms."""
        state, work = self._state, self._lora_work
        multiply = partial(state.product, x_TI, *base)
        y_STY, qkv_TO = self._shrink_beside(multiply, x_TI, QKV, layer)
        expand_rope_write_kv(
            qkv_TO,
            state.cos_sin_L2D,
            self._position_T,
            self._page_T,
            state.pool,
            state.tables,
            layer,
            work,
            y_STY,
        )
        geometry = state.pool.layout.local_geometry
        return qkv_TO.view(len(qkv_TO), -1, geometry.head_dim)[:, : geometry.heads]

    def attention(self, q_TQD: torch.Tensor, layer: int) -> torch.Tensor:
        attention = self._state.attention[self._state.options.windows[layer]]
        out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
        attention.attend(q_TQD, layer, self._attended, out_TQD)
        return out_TQD

    def project(
        self,
        x_TI: torch.Tensor,
        base: Projection,
        group: int,
        layer: int,
        onto_TO: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        state, work = self._state, self._lora_work
        widths = state.pool.layout.local_geometry.group_widths(group)
        multiply = partial(state.product, x_TI, *base, onto_TO=onto_TO)
        if group not in self._groups:
            return torch.split(multiply(), widths, dim=1)
        y_STY, product_TO = self._shrink_beside(multiply, x_TI, group, layer)
        outputs = torch.split(product_TO, widths, dim=1)
        shared = state.lora.share(y_STY, outputs, group)
        lora_expand_add(shared.outputs, group, state.pool, state.tables, layer, work, shared.y)
        return outputs

    def _shrink_beside(
        self, multiply: Callable[[], torch.Tensor], x_TI: torch.Tensor, group: int, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial sums of the products with A, and the base model's product.

        A shrink that is launched second takes the multiprocessors that the product leaves.
        """
        state, rows = self._state, len(x_TI)
        side = state.side if rows <= ROWS_BESIDE_PRODUCT else IN_ORDER
        shrink = partial(lora_shrink, x_TI, group, state.pool, state.tables, layer, self._lora_work)
        side.fork()
        if ROWS_BEFORE_PRODUCT < rows <= ROWS_BESIDE_PRODUCT:
            product_TO = multiply()
            with side.launches():
                y_STY = shrink()
        else:
            with side.launches():
                y_STY = shrink()
            product_TO = multiply()
        side.join()
        return y_STY, product_TO

    def swiglu(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        out_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
        swiglu(gate_TI, up_TI, out_TI)
        return out_TI
