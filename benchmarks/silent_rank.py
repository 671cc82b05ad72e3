"""A tensor-parallel rank whose LoRA tells the others nothing: what S-LoRA's exchange costs.

    python -m benchmarks.silent_rank

takes the place of the worker's own rank process. Adapters are cut by S-LoRA's strategy and products
with A are left as each rank has them, so the tokens are wrong.
"""

import contextlib
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch

from lorry.kernels.page_layout import PageLayout
from lorry.worker import building, rank_process
from lorry.worker.collectives import Collectives
from lorry.worker.lora_sharing import SharedProducts

SILENT_COMMAND = (sys.executable, "-m", "benchmarks.silent_rank")


class Silent:
    """See `Collectives`: every other rank might have the same."""

    def __init__(self, size: int) -> None:
        self._size = size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(self._size, *x.shape)

    def share(self, num_bytes: int) -> None:
        return None


def _silent(layout: PageLayout, _: Collectives, *, max_rank: int) -> SharedProducts:
    return SharedProducts(layout, Silent(layout.tp_size), max_rank=max_rank)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Ranks that are built within it say nothing of LoRA."""
    with patch.object(building, "lora_sharing", _silent):
        yield


if __name__ == "__main__":
    with silenced():
        rank_process.main()
