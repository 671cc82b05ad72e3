"""The forward pass of Llama's decoder and its relatives: one call for all rows of a step.

Shape suffixes: T = rows of the step, H = hidden size, N = rows that sample, V = vocabulary.
"""

import dataclasses
from functools import partial

import torch

from lorry.kernels.page_layout import DOWN, GATE_UP, OUTPUT
from lorry.worker.operations import Operations, Product
from lorry.worker.products import torch_linear
from lorry.worker.row_sums import RowSums
from lorry.worker.vocabulary import Vocabulary
from lorry.worker.weights import LayerWeights, ModelWeights


class Decoder:
    """The base model's weights, or one rank's parts of them, and what to compute with them."""

    def __init__(
        self,
        weights: ModelWeights,
        vocabulary: Vocabulary,
        sums: RowSums,
        *,
        product: Product = torch_linear,
    ) -> None:
        """`product` multiplies by the head; the layers' products are those of the operations."""
        self._weights = weights
        self._vocabulary = vocabulary
        self._sums = sums
        self._product = product
        layers = weights.layers
        self._next_norms = [*(layer.input_norm for layer in layers[1:]), weights.norm]

    def first_layer(self) -> "Decoder":
        """The model without its other layers."""
        weights = dataclasses.replace(self._weights, layers=self._weights.layers[:1])
        return self._copy(weights, self._product)

    def with_product(self, product: Product) -> "Decoder":
        """The model with another product."""
        return self._copy(self._weights, product)

    def forward(self, token_id_T: torch.Tensor, operations: Operations) -> torch.Tensor:
        """Compute the step's rows and write their KV; returns the normed hidden states [T, H]."""
        residual_TH = self._vocabulary.embed(token_id_T, self._weights.embedding)
        x_TH = operations.rms_norm(residual_TH, self._weights.layers[0].input_norm)
        for index, layer in enumerate(self._weights.layers):
            attend = partial(self._attend, x_TH, layer, index, operations)
            x_TH, residual_TH = self._sums.add_rms_norm(
                attend, residual_TH, layer.post_attention_norm, operations
            )
            feed_forward = partial(self._feed_forward, x_TH, layer, index, operations)
            x_TH, residual_TH = self._sums.add_rms_norm(
                feed_forward, residual_TH, self._next_norms[index], operations
            )
        return x_TH

    def logits(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, ``[N, V]``; on a rank, those of its part of the vocabulary."""
        return self._product(x_NH, self._weights.head)

    def _copy(self, weights: ModelWeights, product: Product) -> "Decoder":
        return Decoder(weights, self._vocabulary, self._sums, product=product)

    def _attend(
        self,
        x_TH: torch.Tensor,
        layer: LayerWeights,
        index: int,
        operations: Operations,
        onto_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """The attention block's output; on a rank, its part of the sum."""
        q_TQD = operations.project_qkv(x_TH, layer.qkv, layer.head_norms, index)
        mixed = operations.attention(q_TQD, index).flatten(1)
        (o_TH,) = operations.project(mixed, layer.o, OUTPUT, index, onto_TH)
        return o_TH

    def _feed_forward(
        self,
        x_TH: torch.Tensor,
        layer: LayerWeights,
        index: int,
        operations: Operations,
        onto_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """The MLP's output; on a rank, its part of the sum."""
        gate, up = operations.project(x_TH, layer.gate_up, GATE_UP, index)
        product = operations.swiglu(gate, up)
        (down_TH,) = operations.project(product, layer.down, DOWN, index, onto_TH)
        return down_TH
