"""Page images reach their pages on the GPU, and nothing else changes."""

import time
from pathlib import Path

import pytest
import torch

from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout
from lorry.kernels.pool_view import PoolView, allocate_pool
from lorry.worker import messages as m
from lorry.worker.adapter_memory import DirectAdapterMemory
from lorry.worker.cuda_adapter_memory import NEVER, CudaAdapterMemory
from lorry.worker.residency import Adapter
from lorry.worker.staging import Staging

LAYOUT = PageLayout(
    geometry=ModelGeometry(
        layers=4, hidden=2048, heads=16, kv_heads=16, head_dim=128, intermediate=4096
    ),
    dtype=Dtype.BF16,
)
PAGES = 64
PLACES = {
    "consecutive": [[10, 11, 12, 13], [20, 21], [30]],
    "scattered": [[50, 3, 61, 17], [5, 40], [1]],
}


def loads(directory: Path, places: list[list[int]]) -> list[Adapter]:
    """Adapters whose images are files of random bytes."""
    found = []
    for slot, pages in enumerate(places):
        path = directory / f"image-{slot}"
        num_bytes = len(pages) * LAYOUT.page_bytes
        path.write_bytes(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy().tobytes())
        module = m.ImageModule("q_proj", slot, slot + 1, [float(slot)] * 4)
        version = bytes([slot])
        image = m.ImageReady(version, str(path), 0, num_bytes, len(pages), 8, [module])
        found.append(Adapter(version, image=image, pages=pages, slot=slot))
    return found


def load_all(memory: CudaAdapterMemory | DirectAdapterMemory, adapters: list[Adapter]) -> None:
    for adapter in adapters:
        assert adapter.image is not None
        memory.map(adapter.image)
        memory.begin_load(adapter)
    left, deadline_s = len(adapters), time.monotonic() + 60
    while left:
        left -= len(memory.finished_loads())
        assert time.monotonic() < deadline_s, "the copies never ended"
    for adapter in adapters:
        memory.unmap(adapter.version)


def contents(memory: CudaAdapterMemory | DirectAdapterMemory, pool: PoolView) -> list[torch.Tensor]:
    tables = memory.tables
    parts = [pool.slices.view(torch.uint8), tables.page_SP, tables.rank_S, tables.a_offset_SX]
    return [part.cpu() for part in (*parts, tables.b_offset_SX, tables.scale_SLX)]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("registered_from_load", [1, NEVER], ids=["registered", "staged"])
def test_images_reach_their_pages_and_tables(
    gpu: torch.device, tmp_path: Path, registered_from_load: int, places: list[list[int]]
) -> None:
    adapters = loads(tmp_path, places)
    pool = allocate_pool(PAGES, LAYOUT, gpu)
    memory = CudaAdapterMemory(pool, max_rank=8, registered_from_load=registered_from_load)
    load_all(memory, adapters)
    expected_pool = allocate_pool(PAGES, LAYOUT, torch.device("cpu"))
    expected = DirectAdapterMemory(expected_pool, max_rank=8)
    load_all(expected, adapters)
    for got, wanted in zip(contents(memory, pool), contents(expected, expected_pool), strict=True):
        assert torch.equal(got, wanted)


def test_staging_waits_for_a_part_that_is_still_read(gpu: torch.device) -> None:
    """The copies wait for a long product, so every part is still to be read on its next turn."""
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    target = torch.zeros(1 << 20, dtype=torch.uint8, device=gpu)
    product = torch.randn(8192, 8192, device=gpu)
    staging = Staging(part_bytes=1000, parts=3)
    torch.mm(product, product)
    staging.copy(source, target)
    assert torch.equal(target.cpu(), source)
