"""Adapters added to the base weights, and taken out again."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from lorry.kernels.page_layout import GROUPS, PageLayout
from lorry.kernels.pool_view import TORCH_DTYPES
from lorry.worker import building
from lorry.worker import messages as m
from lorry.worker.weights import LayerWeights, ModelWeights, load_weights


@contextlib.contextmanager
def kept_weights() -> Iterator[list[ModelWeights]]:
    """The weights of each engine that is built while the block runs, in order."""
    found = list[ModelWeights]()

    def kept(*arguments: Any, **options: Any) -> ModelWeights:
        found.append(load_weights(*arguments, **options))
        return found[-1]

    with patch.object(building, "load_weights", kept):
        yield found


class MergedWeights:
    """Base weights into which one adapter at a time is merged, in place, so that graphs hold."""

    def __init__(self, weights: ModelWeights, layout: PageLayout) -> None:
        self._weights = weights
        self._layout = layout
        self._saved = [[w.clone() for w in self._projections(one)] for one in weights.layers]

    def merge(self, image: m.ImageReady) -> None:
        """Add ``scale * B A`` of an adapter of q, k, v and o, in the weights' own dtype."""
        with torch.inference_mode():
            slices_PLE = self._read(image)
            for layer, weights in enumerate(self._weights.layers):
                virtual = slices_PLE[:, layer].reshape(-1)
                for module in image.modules:
                    self._add(virtual, image.rank, module, weights, layer)

    def restore(self) -> None:
        """The base weights, exactly."""
        with torch.inference_mode():
            for layer, saved in zip(self._weights.layers, self._saved, strict=True):
                for weight, before in zip(self._projections(layer), saved, strict=True):
                    weight.copy_(before)

    def _read(self, image: m.ImageReady) -> torch.Tensor:
        """``[pages, layers, slice elements]`` on the weights' device."""
        layout = self._layout
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            content = bytearray(file.read(image.image_bytes))
        elements = torch.frombuffer(content, dtype=TORCH_DTYPES[layout.dtype])
        device = self._weights.embedding.device
        return elements.to(device).view(-1, layout.geometry.layers, layout.slice_elements)

    def _add(
        self,
        virtual: torch.Tensor,
        rank: int,
        module: m.ImageModule,
        weights: LayerWeights,
        layer: int,
    ) -> None:
        geometry, unit = self._layout.geometry, self._layout.row_unit
        in_width, out_width = geometry.module_shape(module.name)

        def rows(offset: int, width: int, padded: int) -> torch.Tensor:
            start = offset * unit
            return virtual[start : start + rank * padded].view(rank, padded)[:, :width]

        a_width, b_width = self._layout.row_widths(module.name)
        a_RI = rows(module.row_offset, in_width, a_width)
        b_RO = rows(module.b_row_offset, out_width, b_width)
        group = next(number for number, names in enumerate(GROUPS) if module.name in names)
        place = GROUPS[group].index(module.name)
        first = sum(geometry.group_widths(group)[:place])
        weight_OI = self._projections(weights)[group][first : first + out_width]
        weight_OI.addmm_(b_RO.T, a_RI, alpha=module.scale_per_layer[layer])

    @staticmethod
    def _projections(layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the groups that are merged: q, k, v together, and o."""
        return layer.qkv.weight_OI, layer.o.weight_OI
