"""A worker of several tensor-parallel processes, with a router attached to it."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import psutil

from tests.support.attached_router import AttachedRouter, attached_router
from tests.support.processes import ready
from tests.support.worker_process import WorkerProcess, worker_process


@contextlib.asynccontextmanager
async def attached_worker(
    model: Path,
    *options: str,
    module: str = "lorry.worker",
    timeout_s: float = 60.0,
    **environment: str,
) -> AsyncIterator[tuple[WorkerProcess, AttachedRouter]]:
    with worker_process(model, *options, module=module, **environment) as worker:
        await ready(worker.address, timeout_s=timeout_s)
        async with (
            grpc.aio.insecure_channel(worker.address) as channel,
            attached_router(channel, "router") as router,
        ):
            yield worker, router


def ranks_of(worker: WorkerProcess) -> list[psutil.Process]:
    """The processes of all ranks, the engine's first."""
    children = psutil.Process(worker.process.pid).children()
    return sorted(children, key=lambda p: "lorry.worker.rank_process" in p.cmdline())
