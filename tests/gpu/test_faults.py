"""How a worker ends whose GPU is full, or fails: real processes, one line that says why."""

import asyncio
import re
from pathlib import Path

import torch

from lorry.rpc.channel import open_channel
from lorry.rpc.errors import LorryError, WorkerLost
from tests.support.attached_router import attached_router
from tests.support.command import REPO
from tests.support.processes import ready
from tests.support.worker_process import WorkerProcess, worker_process

MODEL = REPO / "demo" / "model"
CUDA = ("--device=cuda", "--max-running=16", "--step-tokens=64")
GIB = 1 << 30


def errors(worker: WorkerProcess) -> list[str]:
    """What the ended worker's log says as errors."""
    return re.findall(r"ERROR \S+: (.*)", "".join(worker.log))


def refusal(*options: str) -> str:
    """The one line with which a worker refuses to start, before it captures anything."""
    with worker_process(MODEL, *CUDA, *options, module="lorry.worker") as worker:
        assert worker.wait() == 1
    log = "".join(worker.log)
    assert "Traceback" not in log
    assert "captured" not in log
    (error,) = errors(worker)
    return error


def test_a_pool_that_is_too_large_is_refused_with_what_would_fit(gpu: torch.device) -> None:
    error = refusal(f"--pool-bytes={1 << 42}")
    assert re.search(r"pool_pages \d+ \(4096\.00 GiB\) does not fit: the GPU has", error)
    assert re.search(r"at most pool_pages \d+ \(pool_bytes \d+\) fits", error)


def test_a_gpu_that_others_have_filled_is_refused(gpu: torch.device) -> None:
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(gpu)
    taken = torch.empty(free_bytes - 2 * GIB, dtype=torch.uint8, device=gpu)
    try:
        assert "memory_fraction 0.9 leaves no room for a pool: the GPU has" in refusal()
    finally:
        del taken
        torch.cuda.empty_cache()


def test_an_illegal_access_of_a_kernel_ends_the_worker(gpu: torch.device, tmp_path: Path) -> None:
    async def error_of_stream(address: str) -> LorryError | None:
        await ready(address, timeout_s=300)
        async with open_channel(address) as channel, attached_router(channel, "router") as router:
            await router.submit(list(range(3, 40)), max_tokens=50)
            return await router.until_ended()

    options = (*CUDA, "--pool-pages=1000")
    module = "tests.support.faulty_worker"
    with worker_process(MODEL, *options, module=module, FAULTY_WORKER="illegal-access") as worker:
        assert isinstance(asyncio.run(error_of_stream(worker.address)), WorkerLost)
        assert worker.wait() == 1
    assert errors(worker)[-1].startswith("the engine failed: the GPU failed")
    assert "illegal memory access" in errors(worker)[-1]
    assert "Traceback" not in "".join(worker.log)
