"""Where tensor-parallel ranks find each other: a key-value store in the first one's process.

The front has its socket listen before any rank starts, so that no other process can take the port.
"""

import atexit
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from lorry.worker.collectives import Group, join_by_gloo, join_by_nccl
from lorry.worker.config import Device
from lorry.worker.device_memory import open_device

HOST = "127.0.0.1"
TIMEOUT_S = 120.0  # until all ranks are there


def meet(
    port: int, device: Device, *, rank: int, size: int, listening_fd: int | None = None
) -> Group:
    """The group of all ranks; the first one takes over the listening socket.

    Raises RuntimeError if the others do not come in time, and NoSuchGpu.
    """
    open_device(device, rank, size)
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
    join = join_by_nccl if device == "cuda" else join_by_gloo
    return join(store, rank=rank, size=size)
