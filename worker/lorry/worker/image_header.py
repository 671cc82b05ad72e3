"""What the store says of a page image, checked against this worker's own layout arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorry.kernels.page_layout import MODULES, PageLayout
from lorry.rpc.errors import AdapterIncompatible
from lorry.rpc.layout import layout_to_proto
from lorry.v1 import adapter_data_service_pb2 as pb
from lorry.worker.messages import ImageModule, ImageReady


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """What page images must be for this worker."""

    layout: PageLayout
    model_digest: bytes
    max_rank: int

    def to_proto(self) -> pb.PageLayout:
        return layout_to_proto(self.layout, self.model_digest)

    def check(self, header: pb.ImageHeader, version: bytes) -> None:
        """Raises AdapterIncompatible naming what differs."""
        if not 1 <= header.rank <= self.max_rank:
            raise AdapterIncompatible(
                f"rank {header.rank} is not in [1, {self.max_rank}], what this worker serves",
                rank=header.rank,
                maxRank=self.max_rank,
            )
        names = [module.name for module in header.modules]
        if names != [name for name in MODULES if name in names]:
            raise AdapterIncompatible(f"page image: modules {names} are unknown or out of order")
        pages = self.layout.pages(names, header.rank)
        offsets = self.layout.offsets(names, header.rank)
        given = {
            "version": (header.version, version),
            "layout": (header.layout, self.to_proto()),
            "pages": (header.pages, pages),
            "image_bytes": (header.image_bytes, pages * self.layout.page_bytes),
            "offsets": (
                [(module.row_offset, module.b_row_offset) for module in header.modules],
                [(offsets[name].a, offsets[name].b) for name in names],
            ),
        }
        for field, (actual, expected) in given.items():
            if actual != expected:
                raise AdapterIncompatible(f"page image: {field} is {actual!r}, not {expected!r}")
        for module in header.modules:
            self._check_scales(module.name, module.scale_per_layer)

    def _check_scales(self, name: str, scales: Sequence[float]) -> None:
        if len(scales) != self.layout.geometry.layers or not all(map(math.isfinite, scales)):
            raise AdapterIncompatible(f"page image: {name} has no finite scale for each layer")


def to_image(header: pb.ImageHeader, path: str, offset: int, *, copied: bool = False) -> ImageReady:
    """A checked header and where the image's bytes are, as the engine takes them."""
    return ImageReady(
        version=header.version,
        path=path,
        offset=offset,
        image_bytes=header.image_bytes,
        pages=header.pages,
        rank=header.rank,
        modules=[
            ImageModule(m.name, m.row_offset, m.b_row_offset, list(m.scale_per_layer))
            for m in header.modules
        ],
        copied=copied,
    )
