"""Sums over the GPUs of one host, each of which reads all others' memory at once.

Through torch's symmetric memory: each rank has a buffer that the others map. For small sums one
kernel of torch's waits until all have written theirs, adds them in the order of ranks, and waits
until all have read. So every rank has the same bits, and the buffer is free again once the kernel
is done. Other buffers are for `lorry.worker.row_sums`.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, Store, _register_process_group

from lorry.worker.collectives import Collectives, Group

# On two H200 14 us instead of 25 for 1 MiB; what larger ones take, python -m benchmarks.collectives
# tells up to 8 MiB.
MAX_BYTES = 4 << 20
ALIGNMENT_BYTES = 16
DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernel adds
GROUP: Any = "ranks"  # of a type that not all versions of torch have

log = logging.getLogger(__name__)


class PeerMemory(Protocol):
    """What ranks can do that read each other's memory."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over all ranks; `x` is small."""
        ...

    def share(self, num_bytes: int) -> Sequence[torch.Tensor]:
        """See `Collectives`."""
        ...


class OneShot:
    """Takes another way for what is small; see `Collectives`."""

    def __init__(self, peers: PeerMemory, others: Collectives) -> None:
        self._peers, self._others = peers, others

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._peers.sum(x) if is_small(x) else self._others.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._others.all_gather(x)

    def share(self, num_bytes: int) -> Sequence[torch.Tensor]:
        return self._peers.share(num_bytes)


def is_small(x: torch.Tensor) -> bool:
    """Also the same on all ranks, which have tensors of the same shape and type."""
    return x.dtype in DTYPES and 0 < x.nbytes <= MAX_BYTES and x.nbytes % ALIGNMENT_BYTES == 0


def with_one_shot(
    group: Group, open_peers: Callable[[], PeerMemory], device: torch.device, *, can: bool
) -> Collectives:
    """`group` with the other way for small sums, if all ranks can, and `open_peers` does not raise.

    Every rank must call it.
    """
    if not agreed(group, can, device):
        log.info("sums are not one-shot: the GPUs cannot read each other")
        return group
    try:
        peers = open_peers()
    except RuntimeError as error:
        log.warning("sums are not one-shot: %s", str(error).partition("\n")[0])
        peers = None
    if not agreed(group, peers is not None, device) or peers is None:
        return group
    log.info("sums of up to %d bytes are one-shot", MAX_BYTES)
    return OneShot(peers, group)


def agreed(group: Collectives, can: bool, device: torch.device) -> bool:
    """Whether all ranks can."""
    return bool(group.all_gather(torch.tensor(can, dtype=torch.int32, device=device)).min())


def can_read_others(rank: int, size: int) -> bool:
    """Whether a rank's GPU reads the memory of all others."""
    others = (other for other in range(size) if other != rank)
    return all(torch.cuda.can_device_access_peer(rank, other) for other in others)


class SymmetricMemory:
    """torch's; see `PeerMemory`. One in a process: torch numbers their meetings."""

    def __init__(self, backend: Any, store: Store, *, rank: int, size: int) -> None:
        """Meet the others; raises RuntimeError if they do not come, or memory cannot be shared."""
        self._rank, self._size, self._device = rank, size, torch.device("cuda", rank)
        self._group = named_group(backend, store, rank=rank, size=size, device=self._device)
        self._shared: list[Any] = []  # each of which unmaps its memory as it goes
        self._buffer = self.share(MAX_BYTES)[rank]
        if self.sum(torch.ones(ALIGNMENT_BYTES, device=self._device))[0].item() != size:
            raise RuntimeError("the sum of ones is not their number")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        own = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        # torch 2.11's kernel that copies, too, tells the others before all its threads have copied.
        own.copy_(x)
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(own, "sum", GROUP)
        return total

    def share(self, num_bytes: int) -> Sequence[torch.Tensor]:
        from torch.distributed import _symmetric_memory as symmetric

        own = symmetric.empty(num_bytes, dtype=torch.uint8, device=self._device)
        own.zero_()
        torch.cuda.synchronize(self._device)  # before another rank writes
        met = symmetric.rendezvous(own, GROUP)
        self._shared.append(met)
        return [
            own if rank == self._rank else met.get_buffer(rank, (num_bytes,), torch.uint8)
            for rank in range(self._size)
        ]


def named_group(
    backend: Any, store: Store, *, rank: int, size: int, device: torch.device
) -> ProcessGroup:
    """The group under the name by which torch finds store and ranks; to be kept."""
    group = ProcessGroup(PrefixStore(GROUP, store), rank, size)
    kind = ProcessGroup.BackendType.NCCL if device.type == "cuda" else ProcessGroup.BackendType.GLOO
    group._register_backend(torch.device(device.type), kind, backend)
    group._set_default_backend(kind)
    group._set_group_name(GROUP)
    _register_process_group(GROUP, group)
    return group
