"""Which part of each weight a tensor-parallel rank holds.

Megatron's partition (Shoeybi et al., arXiv 1909.08053): q, k, v, gate and up are split by output,
o and down by input, the embedding and the head by vocabulary. Query heads stay with their KV head;
with fewer KV heads than ranks, several ranks hold the same one and share its queries. Ranks whose
share is smaller than the others' are padded with zeros, so that all have the same shapes.

Pure: the store packs adapters and the worker reads the base model by this module.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from lorry.kernels.page_layout import ROW_PARALLEL, PageLayout, TpStrategy


class Part(NamedTuple):
    """Consecutive indices of one dimension of a whole tensor, then zeros up to `width`."""

    start: int
    stop: int
    width: int  # of every rank's part, padding included
    whole: int  # of the dimension of the whole tensor

    @classmethod
    def all_of(cls, whole: int) -> "Part":
        return cls(0, whole, whole, whole)

    @classmethod
    def cut(cls, whole: int, size: int, rank: int) -> "Part":
        """Part `rank` of `size` parts of equal width."""
        width = math.ceil(whole / size)
        start = min(rank * width, whole)
        return cls(start, min(start + width, whole), width, whole)

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.length == self.whole == self.width

    @property
    def indices(self) -> slice:
        return slice(self.start, self.stop)

    def times(self, elements: int) -> "Part":
        """The part in elements where each of its indices stands for `elements` of them."""
        return Part(*(value * elements for value in self))


@dataclass(frozen=True, slots=True)
class Partition:
    """What the rank of `layout` holds of the base model and of adapters."""

    layout: PageLayout

    @property
    def query_heads(self) -> Part:
        geometry, width = self.layout.geometry, self.layout.local_geometry.heads
        sharers = self._sharers
        if sharers == 1:
            return Part.cut(geometry.heads, self.layout.tp_size, self.layout.tp_rank)
        group = geometry.heads // geometry.kv_heads
        kv_head, share = divmod(self.layout.tp_rank, sharers)
        part = Part.cut(group, sharers, share)
        first = kv_head * group
        return Part(first + part.start, first + part.stop, width, geometry.heads)

    @property
    def kv_heads(self) -> Part:
        kv_heads, sharers = self.layout.geometry.kv_heads, self._sharers
        return Part.cut(
            kv_heads, max(self.layout.tp_size // sharers, 1), self.layout.tp_rank // sharers
        )

    def vocabulary(self, size: int) -> Part:
        """The rank's token ids."""
        return self._cut(size)

    def outputs(self, module: str) -> Part:
        """Output columns of a module's base weight."""
        geometry = self.layout.geometry
        match module:
            case "q_proj":
                return self.query_heads.times(geometry.head_dim)
            case "k_proj" | "v_proj":
                return self.kv_heads.times(geometry.head_dim)
            case "gate_proj" | "up_proj":
                return self._cut(geometry.intermediate)
        return Part.all_of(geometry.hidden)

    def inputs(self, module: str) -> Part:
        """Input columns of a module's base weight and of an adapter's A."""
        geometry = self.layout.geometry
        match module:
            case "o_proj":
                return self.query_heads.times(geometry.head_dim)
            case "down_proj":
                return self._cut(geometry.intermediate)
        return Part.all_of(geometry.hidden)

    def adapter_outputs(self, module: str) -> Part:
        """Output columns of an adapter's B: under S-LoRA's strategy those of o and down, too."""
        if module in ROW_PARALLEL and self.layout.tp_strategy is TpStrategy.SLORA:
            return self._cut(self.layout.geometry.hidden)
        return self.outputs(module)

    def a_rows(self, module: str) -> slice:
        """Rows of an adapter's A. Under S-LoRA's strategy they are dealt out one by one, so that
        the gathered products of adapters of any rank interleave to the order of B's rows."""
        if module in ROW_PARALLEL or self.layout.tp_strategy is not TpStrategy.SLORA:
            return slice(None)
        return slice(self.layout.tp_rank, None, self.layout.tp_size)

    @property
    def _sharers(self) -> int:
        """Ranks that hold the same KV head."""
        geometry, size = self.layout.geometry, self.layout.tp_size
        if geometry.heads == geometry.kv_heads:
            return 1
        return max(size // geometry.kv_heads, 1)

    def _cut(self, whole: int) -> Part:
        return Part.cut(whole, self.layout.tp_size, self.layout.tp_rank)
