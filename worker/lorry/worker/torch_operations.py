"""The operations of a step by their torch references."""

from collections.abc import Sequence

import torch

from lorry.kernels.activation import swiglu_reference
from lorry.kernels.lora import AdapterTables
from lorry.kernels.norm import add_rms_norm_reference, rms_norm_reference
from lorry.kernels.page_layout import QKV
from lorry.kernels.paged_attention import paged_attention_reference
from lorry.kernels.pool_view import PoolView
from lorry.kernels.rope import QkNorm, rope_write_kv_reference
from lorry.rpc.model_families import DecoderOptions
from lorry.worker.lora_strategies import LoraStrategy
from lorry.worker.operations import HeadNorms, Projection
from lorry.worker.products import torch_linear
from lorry.worker.step_input import StepInput


class TorchOperations:
    """Runs on the pool's device; see `Operations`."""

    def __init__(
        self,
        step: StepInput,
        adapters: AdapterTables,
        pool: PoolView,
        cos_sin_L2D: torch.Tensor,
        options: DecoderOptions,
        lora: LoraStrategy,
    ) -> None:
        self._step = step
        self._adapters = adapters
        self._pool = pool
        self._cos_sin_L2D = cos_sin_L2D
        self._options = options
        self._lora = lora

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        return rms_norm_reference(x_TH, weight_H, self._options.norm_epsilon)

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm_reference(x_TH, residual_TH, weight_H, self._options.norm_epsilon)

    def project_qkv(
        self, x_TI: torch.Tensor, base: Projection, norms: HeadNorms | None, layer: int
    ) -> torch.Tensor:
        step, head_dim = self._step, self._pool.layout.geometry.head_dim
        q_TQD, k_TKD, v_TKD = (
            part.view(len(part), -1, head_dim) for part in self.project(x_TI, base, QKV, layer)
        )
        return rope_write_kv_reference(
            q_TQD,
            k_TKD,
            v_TKD,
            self._cos_sin_L2D,
            step.position_T,
            step.page_T,
            self._pool,
            layer,
            norms and QkNorm(*norms, self._options.norm_epsilon),
        )

    def attention(self, q_TQD: torch.Tensor, layer: int) -> torch.Tensor:
        step = self._step
        return paged_attention_reference(
            q_TQD,
            self._pool,
            layer,
            step.position_T,
            step.block_table_SP,
            step.attention_tiles,
            self._options.windows[layer],
        )

    def project(
        self,
        x_TI: torch.Tensor,
        base: Projection,
        group: int,
        layer: int,
        onto_TO: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        widths = self._pool.layout.local_geometry.group_widths(group)
        outputs = torch.split(torch_linear(x_TI, *base, onto_TO=onto_TO), widths, dim=1)
        self._lora.add(
            x_TI, outputs, group, self._pool, self._adapters, layer, self._step.lora_tiles
        )
        return outputs

    def swiglu(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        return swiglu_reference(gate_TI, up_TI)
