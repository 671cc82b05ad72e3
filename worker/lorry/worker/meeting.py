"""Where tensor-parallel ranks find each other: a key-value store in the first one's process.

The front has its socket listen before any rank starts, so that no other process can take the port.
"""

import atexit
from datetime import timedelta
from functools import partial

from torch._C._distributed_c10d import TCPStore

from lorry.worker.collectives import Collectives, join_by_gloo, join_by_nccl
from lorry.worker.config import EngineConfig
from lorry.worker.device_memory import open_device
from lorry.worker.one_shot import SymmetricMemory, can_read_others, with_one_shot

HOST = "127.0.0.1"
TIMEOUT_S = 120.0  # until all ranks are there


def meet(
    port: int, config: EngineConfig, *, rank: int, listening_fd: int | None = None
) -> Collectives:
    """The collectives of all ranks; the first one takes over the listening socket.

    Raises RuntimeError if the others do not come in time, and NoSuchGpu.
    """
    size = config.tensor_parallel
    device = open_device(config.device, rank, size)
    store = TCPStore(
        HOST,
        port,
        world_size=size,
        is_master=rank == 0,
        timeout=timedelta(seconds=TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listening_fd,
    )
    atexit.register(lambda: store)  # the group may ask it until the process ends
    if config.device == "cpu":
        return join_by_gloo(store, rank=rank, size=size)
    group = join_by_nccl(store, rank=rank, size=size)
    if not config.one_shot_sums:
        return group
    open_peers = partial(SymmetricMemory, group.backend, store, rank=rank, size=size)
    return with_one_shot(group, open_peers, device, can=can_read_others(rank, size))
