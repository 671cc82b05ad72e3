"""The Llama family's forward pass over the unified pool: one call for all rows of a step.

Shape suffixes: T = rows of the step, H = hidden size, N = rows that sample, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from lorry.kernels.activation import swiglu_reference
from lorry.kernels.lora import AdapterTables, lora_reference
from lorry.kernels.norm import add_rms_norm_reference, rms_norm_reference
from lorry.kernels.page_layout import GROUPS
from lorry.kernels.paged_attention import paged_attention_reference
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.rope import cos_sin_table, rope_write_kv_reference
from lorry.rpc.base_model import BaseModel
from lorry.worker.step_input import StepInput
from lorry.worker.weights import CheckpointReader, LayerWeights, load_weights

QKV, OUTPUT, GATE_UP, DOWN = GROUPS


class LlamaModel:
    """Weights of the base model and the pool that its KV cache and adapters lie in."""

    def __init__(self, base_model: BaseModel, pool: PoolView) -> None:
        geometry = base_model.geometry
        dtype = TORCH_DTYPES[pool.layout.dtype]
        reader = CheckpointReader(base_model, dtype, pool.slices.device)
        self._weights = load_weights(base_model, reader)
        layers = self._weights.layers
        self._next_norms = [*(layer.input_norm for layer in layers[1:]), self._weights.norm]
        self._pool = pool
        self._geometry = geometry
        self._epsilon = float(base_model.config.get("rms_norm_eps", 1e-6))
        table = cos_sin_table(base_model.max_context_tokens, geometry.head_dim, _theta(base_model))
        self._cos_sin = table.to(dtype=dtype, device=pool.slices.device)

    @torch.inference_mode()
    def forward(self, step: StepInput, adapters: AdapterTables) -> torch.Tensor:
        """Compute the step's rows, write their KV, and return the logits of the sampling rows."""
        residual_TH = self._weights.embedding[step.token_id_T]
        x_TH = rms_norm_reference(residual_TH, self._weights.layers[0].input_norm, self._epsilon)
        for index, layer in enumerate(self._weights.layers):
            o_TH = self._attend(x_TH, layer, index, step, adapters)
            x_TH, residual_TH = add_rms_norm_reference(
                o_TH, residual_TH, layer.post_attention_norm, self._epsilon
            )
            down_TH = self._feed_forward(x_TH, layer, index, step, adapters)
            x_TH, residual_TH = add_rms_norm_reference(
                down_TH, residual_TH, self._next_norms[index], self._epsilon
            )
        return linear(x_TH[step.sample_row_N], self._weights.head)

    def _attend(
        self,
        x_TH: torch.Tensor,
        layer: LayerWeights,
        index: int,
        step: StepInput,
        adapters: AdapterTables,
    ) -> torch.Tensor:
        head_dim = self._geometry.head_dim
        widths = [self._geometry.module_shape(module)[1] for module in QKV]
        q, k, v = torch.split(linear(x_TH, layer.qkv), widths, dim=1)
        self._add_lora(x_TH, [q, k, v], QKV, index, step, adapters)
        q_TQD = rope_write_kv_reference(
            q.view(len(q), -1, head_dim),
            k.view(len(k), -1, head_dim),
            v.view(len(v), -1, head_dim),
            self._cos_sin,
            step.position_T,
            step.page_T,
            self._pool,
            index,
        )
        mixed_TQD = paged_attention_reference(
            q_TQD, self._pool, index, step.position_T, step.block_table_SP, step.attention_tiles
        )
        mixed = mixed_TQD.flatten(1)
        o_TH = linear(mixed, layer.o)
        self._add_lora(mixed, [o_TH], OUTPUT, index, step, adapters)
        return o_TH

    def _feed_forward(
        self,
        x_TH: torch.Tensor,
        layer: LayerWeights,
        index: int,
        step: StepInput,
        adapters: AdapterTables,
    ) -> torch.Tensor:
        gate, up = linear(x_TH, layer.gate_up).chunk(2, dim=1)
        self._add_lora(x_TH, [gate, up], GATE_UP, index, step, adapters)
        product = swiglu_reference(gate, up)
        down_TH = linear(product, layer.down)
        self._add_lora(product, [down_TH], DOWN, index, step, adapters)
        return down_TH

    def _add_lora(
        self,
        x: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        modules: Sequence[str],
        layer: int,
        step: StepInput,
        adapters: AdapterTables,
    ) -> None:
        lora_reference(x, outputs, modules, self._pool, adapters, layer, step.lora_tiles)


def _theta(base_model: BaseModel) -> float:
    rope = base_model.config.get("rope_parameters") or {}
    return float(rope.get("rope_theta", base_model.config.get("rope_theta", 10_000.0)))
