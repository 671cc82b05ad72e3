"""The unified pool as kernels see it: pages of slices, in elements of the serving dtype."""

from dataclasses import dataclass

import torch

from lorry.kernels.page_layout import Dtype, PageLayout

TORCH_DTYPES = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}


@dataclass(frozen=True, slots=True)
class PoolView:
    """One buffer for KV cache and adapters; page 0 is a dummy that padded rows may write."""

    slices: (
        torch.Tensor
    )  # [pages * layers, slice elements]; slice l of page p is row p * layers + l
    layout: PageLayout

    @property
    def layers(self) -> int:
        return self.layout.geometry.layers

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """Of a slice that holds KV: key or value, KV heads, tokens, head dimension."""
        layout = self.layout
        return (2, layout.local_kv_heads, layout.page_tokens, layout.geometry.head_dim)

    @property
    def pages(self) -> torch.Tensor:
        """``[pages, layers, slice elements]``."""
        return self.slices.view(-1, self.layers, self.layout.slice_elements)

    @property
    def num_pages(self) -> int:
        return self.slices.shape[0] // self.layers


def allocate_pool(num_pages: int, layout: PageLayout, device: torch.device) -> PoolView:
    """A zeroed pool of `num_pages` pages, the dummy page included."""
    buffer = torch.zeros(num_pages * layout.page_bytes, dtype=torch.uint8, device=device)
    elements = buffer.view(TORCH_DTYPES[layout.dtype])
    return PoolView(elements.view(-1, layout.slice_elements), layout)
