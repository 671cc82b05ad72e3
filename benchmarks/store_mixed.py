"""Do uploads delay fetches? Readers at half of what they can do, alone and beside an upload.

    python -m benchmarks.store_mixed

Eight processes of 25 streams fetch page images (Llama-3-8B, rank 16) through shared memory. In each
round all of them first go as fast as they can; then each stream fetches at a fixed pace, half of
that in all, and a fetch that begins late counts from when it was due: alone, beside a process that
hashes, and with one upload after another under way.

Store, readers and uploader share one machine's processors. The uploader and the process that hashes
stand for other machines, so they get what is left (SCHED_IDLE); what hashing delays, the machine
does, and no store.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc.aio
import ml_dtypes
import numpy as np
import psutil

from benchmarks.results_file import host_name, write_result
from benchmarks.store import CONFIG, LLAMA_3_8B, requests, running
from benchmarks.store_readers import PROCESSES, STREAMS, Place, Readers, readers
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.weight_chunk import upload_adapter
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from tests.support.adapter_store import write_base_model
from tests.support.adapters import lora_files, lora_tensors

VERSIONS = 4
FLOOD_S = 3.0
LAYOUT = PageLayout(geometry=LLAMA_3_8B, dtype=Dtype.BF16)
HASHING = "import hashlib\nwhile True: hashlib.sha256(bytes(80 << 20))"


class Uploader:
    """Pushes adapters of equal shape and different bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub, self._upload = AdapterServiceStub(channel), upload_adapter(channel)
        tensors = lora_tensors(CONFIG, LLAMA_3_8B, dtype=ml_dtypes.bfloat16)
        self._config, self._weights = lora_files(CONFIG, tensors)
        self._stopping = False
        self.count, self.seconds = 0, 0.0  # of those that have ended

    async def push(self) -> bytes:
        begun_s = time.monotonic()
        weights = self._weights[:-4] + np.array([self.count, 1], np.uint16).tobytes()
        upload: Any = await self._stub.CreateUpload(
            pb.CreateUploadRequest(
                adapter_id=f"a-{self.count}",
                config_json=self._config,
                weights_bytes=len(weights),
                weights_sha256=hashlib.sha256(weights).digest(),
            )
        )
        answer: Any = await self._upload(requests(upload.upload_id, weights))
        version: bytes = answer.version.digest
        self.count += 1
        self.seconds += time.monotonic() - begun_s
        return version

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """One upload after another; on exit the last one comes to its end."""
        self._stopping = False
        pushing = asyncio.create_task(self._push_on())
        try:
            yield
        finally:
            self._stopping = True
            await pushing

    async def _push_on(self) -> None:
        while not self._stopping:
            await self.push()


@contextlib.asynccontextmanager
async def hashing() -> AsyncIterator[None]:
    """A process that only keeps a processor busy, with what is left of it."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HASHING)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def measure(
    address: str, place: dict[str, str], rounds: int, seconds: float
) -> dict[str, Any]:
    # Set before gRPC starts its threads and before there are processes: they inherit it.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    async with grpc.aio.insecure_channel(address) as channel:
        uploader = Uploader(channel)
        versions = [(await uploader.push()).hex() for _ in range(VERSIONS)]
        async with readers(Place(address=address, versions=versions, **place)) as fleet:
            await fleet.run(1.0)  # builds the images
            return await compare(fleet, uploader, rounds, seconds)


async def compare(
    fleet: Readers, uploader: Uploader, rounds: int, seconds: float
) -> dict[str, Any]:
    """Rounds of paced runs, one of each kind."""
    kinds: dict[str, Callable[[], AbstractAsyncContextManager[None]]]
    kinds = {"quiet": no_other, "hashing": hashing, "uploading": uploader.at_work}
    p99_ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    idle_cores: dict[str, list[float]] = {kind: [] for kind in kinds}
    capacity_per_s = []
    before, uploader.seconds = uploader.count, 0.0
    for _ in range(rounds):
        capacity_per_s.append(len(await fleet.run(FLOOD_S)) / FLOOD_S)
        period_s = PROCESSES * STREAMS / (capacity_per_s[-1] / 2)
        for kind, beside in kinds.items():
            idle_s = _idle_s()
            async with beside():
                found = await fleet.run(seconds, period_s)
                idle_cores[kind].append((_idle_s() - idle_s) / seconds)
            p99_ms[kind].append(float(np.percentile(found, 99) * 1e3))
    metrics: dict[str, Any] = {"capacity_per_s": _spread(capacity_per_s)}
    metrics |= {f"{kind}_p99_ms": _spread(values) for kind, values in p99_ms.items()}
    metrics |= {f"{kind}_idle_cores": _spread(values) for kind, values in idle_cores.items()}
    for kind in ("hashing", "uploading"):
        pairs = zip(p99_ms["quiet"], p99_ms[kind], strict=True)
        metrics[f"{kind}_ratio"] = _spread([beside / quiet for quiet, beside in pairs])
    uploads = uploader.count - before
    return {**metrics, "uploads": uploads, "upload_s": round(uploader.seconds / uploads, 2)}


def no_other() -> AbstractAsyncContextManager[None]:
    return contextlib.nullcontext()


def _idle_s() -> float:
    """Seconds that the machine's processors have had nothing to do."""
    return float(psutil.cpu_times().idle)


def _spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    found = zip(names, (min(values), *quartiles, max(values)), strict=True)
    return {name: round(value, 2) for name, value in found}


def run(rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        model = write_base_model(Path(name) / "model", LLAMA_3_8B)
        layout = layout_to_proto(LAYOUT, read_base_model(model).digest)
        options = ["--backend", (Path(name) / "adapters").as_uri(), "--shm-dir", shm]
        place = {"shm_dir": shm, "layout": layout.SerializeToString().hex()}
        with running(
            "lorry.adapter_store", "--address", "127.0.0.1:0", "--model", str(model), *options
        ) as address:
            return asyncio.run(measure(address, place, rounds, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each paced run")
    arguments = parser.parse_args()
    load_average = os.getloadavg()[0]
    metrics = run(arguments.rounds, arguments.seconds)
    for key, value in metrics.items():
        print(f"{key:21s} {value}")
    write_result(
        "store-mixed",
        benchmark="store_mixed",
        device=host_name(),
        config={
            "model": "llama-3-8b",
            "rank": CONFIG["r"],
            "processes": PROCESSES,
            "streams": STREAMS,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "load_average": load_average,  # of other work, where there is some
        },
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
