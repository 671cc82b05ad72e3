"""Do uploads delay fetches? Readers at half of what they can do, alone and beside an upload.

    python -m benchmarks.store_mixed

Eight processes of 25 streams fetch page images (Llama-3-8B, rank 16) through shared memory: a call,
the handle, the map, the end of the call. First all of them go as fast as they can; then each stream
fetches at a fixed pace, half of that in all, and a fetch that begins late counts from when it was
due. Rounds alternate: without an upload, and with one after another under way all the time.

Store, readers and uploader share one machine's processors. The idle ones are counted too: once an
upload leaves none, the times tell of the machine.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import ml_dtypes
import numpy as np
import psutil

from benchmarks.results_file import host_name, write_result
from benchmarks.store import CONFIG, LLAMA_3_8B, REPO, requests, running
from lorry.kernels.page_layout import Dtype, PageLayout
from lorry.rpc.base_model import read_base_model
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.shared_memory import open_shared, shm_namespace_id
from lorry.rpc.weight_chunk import upload_adapter
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_data_service_pb2_grpc import AdapterDataServiceStub
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from tests.support.adapter_store import write_base_model
from tests.support.adapters import lora_files, lora_tensors

PROCESSES, STREAMS, VERSIONS = 8, 25, 4
LAYOUT = PageLayout(geometry=LLAMA_3_8B, dtype=Dtype.BF16)
MIN_PACE_S = 1e-3


class Reader:
    """One process's streams."""

    def __init__(self, address: str, shm_dir: Path, layout: bytes, versions: list[bytes]) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = AdapterDataServiceStub(self._channel)
        self._shm_dir, self._versions = shm_dir, versions
        self._requests = [
            data_pb.FetchAdapterRequest(
                version=version,
                layout=data_pb.PageLayout.FromString(layout),
                accepted_transports=[data_pb.TRANSPORT_SHM],
                shm_namespace_id=shm_namespace_id(shm_dir),
            )
            for version in versions
        ]

    async def fetch(self, number: int) -> None:
        call: Any = self._stub.FetchAdapter(self._requests[number % len(self._requests)])
        await call.read()
        handle = (await call.read()).shm
        open_shared(self._shm_dir, handle.name, handle.bytes).release()
        call.cancel()

    async def flood(self, seconds: float) -> list[float]:
        """Each stream fetches again and again; seconds of each fetch."""
        end_s = time.monotonic() + seconds
        found: list[float] = []

        async def stream(number: int) -> None:
            while (begun_s := time.monotonic()) < end_s:
                await self.fetch(number)
                found.append(time.monotonic() - begun_s)

        await asyncio.gather(*(stream(number) for number in range(STREAMS)))
        return found

    async def pace(self, seconds: float, period_s: float) -> list[float]:
        """Each stream fetches once in a period; seconds from when each fetch was due."""
        begun_s = time.monotonic()
        found: list[float] = []

        async def stream(number: int) -> None:
            due_s = begun_s + period_s * number / STREAMS
            while due_s < begun_s + seconds:
                await asyncio.sleep(due_s - time.monotonic())
                await self.fetch(number)
                found.append(time.monotonic() - due_s)
                due_s += period_s

        await asyncio.gather(*(stream(number) for number in range(STREAMS)))
        return found


async def read_orders(order: dict[str, Any]) -> None:
    """Serve lines of standard input; each answer is a line of JSON."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # not as the parent
    reader = Reader(
        order["address"],
        Path(order["shm_dir"]),
        bytes.fromhex(order["layout"]),
        [bytes.fromhex(version) for version in order["versions"]],
    )
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        seconds, period_s = json.loads(line)
        found = await (reader.pace(seconds, period_s) if period_s else reader.flood(seconds))
        print(json.dumps(found), flush=True)


class Readers:
    """The processes."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def run(self, seconds: float, period_s: float = 0.0) -> list[float]:
        """Seconds of all fetches; with a period, paced."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps([seconds, period_s])}\n".encode())
        answers = await asyncio.gather(*(_line(process) for process in self._processes))
        return [each for answer in answers for each in json.loads(answer)]


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()


@contextlib.asynccontextmanager
async def readers(order: dict[str, Any]) -> AsyncIterator[Readers]:
    command = [sys.executable, "-m", "benchmarks.store_mixed", "--reader", json.dumps(order)]
    processes = [
        await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 26,
            cwd=REPO,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for process in processes:
            assert await _line(process) == b"ready\n"
        yield Readers(processes)
    finally:
        for process in processes:
            process.kill()
            await process.wait()


class Uploader:
    """Pushes adapters of equal shape and different bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub, self._upload = AdapterServiceStub(channel), upload_adapter(channel)
        tensors = lora_tensors(CONFIG, LLAMA_3_8B, dtype=ml_dtypes.bfloat16)
        self._config, self._weights = lora_files(CONFIG, tensors)
        self.count = 0

    async def push(self) -> bytes:
        self.count += 1
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
        return version

    async def push_on(self) -> None:
        while True:
            await self.push()


async def measure(
    address: str, order: dict[str, Any], rounds: int, seconds: float
) -> dict[str, Any]:
    # The uploader stands for another machine, whose CPU is its own: here it takes what is left. Set
    # before gRPC starts its threads, which inherit it.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    async with grpc.aio.insecure_channel(address) as channel:
        uploader = Uploader(channel)
        versions = [await uploader.push() for _ in range(VERSIONS)]
        order["versions"] = [version.hex() for version in versions]
        async with readers(order) as fleet:
            await fleet.run(1.0)  # builds the images
            capacity = len(await fleet.run(seconds)) / seconds
            period_s = max(MIN_PACE_S, PROCESSES * STREAMS / (capacity / 2))
            quiet, beside, uploads = [], [], 0
            idle_s = [_idle_s()]
            for _ in range(rounds):
                quiet.append(_p99_ms(await fleet.run(seconds, period_s)))
                idle_s.append(_idle_s())
                before = uploader.count
                pushing = asyncio.create_task(uploader.push_on())
                beside.append(_p99_ms(await fleet.run(seconds, period_s)))
                idle_s.append(_idle_s())
                pushing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pushing
                uploads += uploader.count - before
    idle_cores = (np.diff(idle_s) / seconds).tolist()
    ratios = [after / before for before, after in zip(quiet, beside, strict=True)]
    return {
        "capacity_per_s": round(capacity, 1),
        "paced_per_s": round(PROCESSES * STREAMS / period_s, 1),
        "quiet_p99_ms": _spread(quiet),
        "uploading_p99_ms": _spread(beside),
        "ratio": _spread(ratios),
        "quiet_idle_cores": _spread(idle_cores[::2]),
        "uploading_idle_cores": _spread(idle_cores[1::2]),
        "uploads_begun": uploads,
    }


def _idle_s() -> float:
    """Seconds that the machine's processors have had nothing to do."""
    return float(psutil.cpu_times().idle)


def _p99_ms(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99) * 1e3)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def run(rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        model = write_base_model(Path(name) / "model", LLAMA_3_8B)
        layout = layout_to_proto(LAYOUT, read_base_model(model).digest)
        options = ["--backend", (Path(name) / "adapters").as_uri(), "--shm-dir", shm]
        order = {"shm_dir": shm, "layout": layout.SerializeToString().hex()}
        with running(
            "lorry.adapter_store", "--address", "127.0.0.1:0", "--model", str(model), *options
        ) as address:
            return asyncio.run(measure(address, {**order, "address": address}, rounds, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--reader", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        asyncio.run(read_orders(arguments.reader))
        return
    load_average = os.getloadavg()[0]
    metrics = run(arguments.rounds, arguments.seconds)
    for key, value in metrics.items():
        print(f"{key:18s} {value}")
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
