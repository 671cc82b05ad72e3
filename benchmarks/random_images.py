"""Page images of random normal weights, in host memory, for benchmarks of the engine."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lorry.client.bench.trace import NO_ADAPTER
from lorry.kernels.page_layout import PageLayout
from lorry.rpc.huge_pages import allocate
from lorry.worker import messages as m

FILL_BYTES = 1 << 27
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RandomImages:
    """Page images of random normal weights: windows of one file, each at an offset of its own.

    With `apart`, each is a file of its own, as the store keeps them. All tensor-parallel ranks have
    the same one.
    """

    def __init__(
        self,
        directory: Path,
        layout: PageLayout,
        ranks: Sequence[int],
        adapters: int,
        *,
        targets: Sequence[str] = TARGETS,
        apart: bool = False,
    ) -> None:
        self._directory, self.layout, self._targets = directory, layout, targets
        self._ranks = [ranks[adapter % len(ranks)] for adapter in range(adapters)]
        self._apart = apart
        sizes = [self._bytes(rank) for rank in self._ranks]
        random, step_bytes = _random_bytes(FILL_BYTES), layout.slice_bytes
        if apart:
            for adapter, num_bytes in enumerate(sizes):
                _write(self._path(adapter), random, num_bytes, adapter * step_bytes)
        elif sizes:
            _write(self._path(0), random, max(sizes) + adapters * step_bytes, 0)

    def version(self, adapter: int) -> bytes:
        if adapter == NO_ADAPTER:
            return b""
        return hashlib.sha256(f"adapter {adapter}".encode()).digest()

    def image(self, adapter: int) -> m.ImageReady:
        rank, layout = self._ranks[adapter], self.layout
        file = m.ImageFile(
            str(self._path(adapter)), 0 if self._apart else adapter * layout.slice_bytes
        )
        offsets = layout.offsets(self._targets, rank)
        return m.ImageReady(
            version=self.version(adapter),
            path=file.path,
            offset=file.offset,
            image_bytes=self._bytes(rank),
            pages=layout.pages(self._targets, rank),
            rank=rank,
            modules=[
                m.ImageModule(name, offset.a, offset.b, [2.0] * layout.geometry.layers)
                for name, offset in offsets.items()
            ],
            other_ranks=[file] * (layout.tp_size - 1),
        )

    @staticmethod
    def image_bytes(layout: PageLayout, rank: int, targets: Sequence[str] = TARGETS) -> int:
        return layout.pages(targets, rank) * layout.page_bytes

    def _path(self, adapter: int) -> Path:
        return self._directory / (f"image-{adapter}" if self._apart else "images")

    def _bytes(self, rank: int) -> int:
        return self.image_bytes(self.layout, rank, self._targets)


def _random_bytes(num_bytes: int) -> memoryview:
    numbers = torch.empty(num_bytes // 2, dtype=torch.bfloat16).normal_(0, 0.02)
    return numbers.view(torch.uint8).numpy().data


def _write(path: Path, random: memoryview, num_bytes: int, start: int) -> None:
    """Fill a file, as the store allocates it, with the bytes from `start`, around and around."""
    with path.open("wb+") as file:
        allocate(file.fileno(), num_bytes)
        while num_bytes:
            part = random[start % len(random) :][:num_bytes]
            file.write(part)
            start, num_bytes = start + len(part), num_bytes - len(part)


@contextmanager
def image_directory() -> Iterator[Path]:
    """A directory in shared memory that goes with the block."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lorry-benchmark-") as directory:
        yield Path(directory)
