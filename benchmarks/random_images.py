"""Page images of random normal weights, in host memory, for benchmarks of the engine."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.trace import NO_ADAPTER
from lorry.kernels.page_layout import PageLayout
from lorry.worker import messages as m

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RandomImages:
    """Page images of random normal weights: windows of one file, each at an offset of its own."""

    def __init__(
        self, directory: Path, layout: PageLayout, ranks: Sequence[int], adapters: int
    ) -> None:
        self._layout = layout
        self._ranks = [ranks[adapter % len(ranks)] for adapter in range(adapters)]
        self._path = directory / "images"
        most = max((self._bytes(rank) for rank in self._ranks), default=0)
        _write_random(self._path, most + adapters * self._layout.slice_bytes)

    def version(self, adapter: int) -> bytes:
        if adapter == NO_ADAPTER:
            return b""
        return hashlib.sha256(f"adapter {adapter}".encode()).digest()

    def image(self, adapter: int) -> m.ImageReady:
        rank, layout = self._ranks[adapter], self._layout
        offsets = layout.offsets(TARGETS, rank)
        return m.ImageReady(
            version=self.version(adapter),
            path=str(self._path),
            offset=adapter * layout.slice_bytes,
            image_bytes=self._bytes(rank),
            pages=layout.pages(TARGETS, rank),
            rank=rank,
            modules=[
                m.ImageModule(name, offset.a, offset.b, [2.0] * layout.geometry.layers)
                for name, offset in offsets.items()
            ],
        )

    def _bytes(self, rank: int) -> int:
        return self._layout.pages(TARGETS, rank) * self._layout.page_bytes


def _write_random(path: Path, num_bytes: int) -> None:
    part = torch.empty(1 << 26, dtype=torch.bfloat16)
    with path.open("wb") as file:
        for start in range(0, num_bytes, part.nbytes):
            part.normal_(0, 0.02)
            file.write(part.view(torch.uint8).numpy().data[: num_bytes - start])


@contextmanager
def image_directory() -> Iterator[Path]:
    """A directory in shared memory that goes with the block."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lorry-benchmark-") as directory:
        yield Path(directory)
