"""What tensor-parallel ranks tell each other within a step.

Every rank makes the same calls in the same order, in the order of the current stream where they
compute on GPUs, so that CUDA graphs hold the calls too. One rank alone has nothing to tell.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, Store

TIMEOUT_S = 120.0  # of one call, should the front not have ended a hung rank before


class Collectives(Protocol):
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, perhaps in `x`, which may not be used again."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, ``[ranks, *x.shape]``."""
        ...

    def share(self, num_bytes: int) -> Sequence[torch.Tensor] | None:
        """Zeros of each rank that all ranks read and write, uint8; None where none can be had.

        All ranks must ask for as many. It lives as long as the process.
        """
        ...


class Alone:
    """The collectives of one rank; see `Collectives`."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def share(self, num_bytes: int) -> None:
        return None


class Group:
    """The collectives of a backend of torch.distributed, gloo's or NCCL's; see `Collectives`."""

    def __init__(self, backend: Any, size: int) -> None:
        self.backend = backend  # of which torch's stubs know little
        self._size = size
        # Else NCCL's would run on a stream of its own.
        self._reducing, self._gathering = AllreduceOptions(), AllgatherOptions()
        self._reducing.asyncOp = self._gathering.asyncOp = False

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        _wait(self.backend.allreduce([x], self._reducing))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self._size * x.numel())
        _wait(self.backend._allgather_base(out, x.flatten(), self._gathering))
        return out.view(self._size, *x.shape)

    def share(self, num_bytes: int) -> None:
        return None


def _wait(work: Any) -> None:
    """Where a backend has not done so in the call."""
    if work is not None:
        work.wait()


def join_by_gloo(store: Store, *, rank: int, size: int) -> Group:
    """Meet the other ranks at `store`; raises RuntimeError if they do not come in time."""
    gloo: Any = _distributed_c10d.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return Group(gloo(store, rank, size, options), size)


def join_by_nccl(store: Store, *, rank: int, size: int) -> Group:
    """The same for ranks that compute on GPUs; they meet in their first call."""
    nccl: Any = getattr(_distributed_c10d, "ProcessGroupNCCL")  # noqa: B009  # not in CPU builds
    options = nccl.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    options.group_name, options.global_ranks_in_group = "ranks", list(range(size))
    return Group(nccl(store, rank, size, options), size)
