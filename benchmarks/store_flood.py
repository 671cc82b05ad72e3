"""One tenant offers ten thousand uploads over twenty connections, and another pushes an adapter.

    python -m benchmarks.store_flood

The store is the real process. Of the flood, as many uploads as the tenant's limit are under way and
all others are refused as TENANT_LIMIT; the other tenant's upload completes meanwhile; memory stays.
"""

import argparse
import asyncio
import hashlib
import json
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.results_file import host_name, write_result
from benchmarks.store import requests
from benchmarks.store_population import Files
from benchmarks.store_process import Place, RunningStore, started
from lorry.rpc.channel import bearer
from lorry.rpc.errors import TenantLimit
from lorry.rpc.status import from_rpc
from lorry.rpc.weight_chunk import upload_adapter
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from tests.support.adapter_store import write_base_model

CONNECTIONS, LIMIT = 20, 64
TENANTS = ("flood", "calm")


def write_tokens(path: Path) -> None:
    tokens = [
        {"sha256": hashlib.sha256(t.encode()).hexdigest(), "tenant": t, "role": "manage"}
        for t in TENANTS
    ]
    path.write_text(json.dumps({"tokens": tokens}))


@cache
def files() -> tuple[str, bytes]:
    return Files.make().of(0)


async def begin(stub: Any, tenant: str, number: int) -> str:
    """The id of a new upload."""
    config, weights = files()
    answer = await stub.CreateUpload(
        pb.CreateUploadRequest(
            adapter_id=f"a-{number}",
            config_json=config,
            weights_bytes=len(weights),
            weights_sha256=hashlib.sha256(weights).digest(),
        ),
        metadata=bearer(tenant),
    )
    return str(answer.upload_id)


async def flood(address: str, numbers: range) -> Counter[str]:
    """How each upload that one connection offers is answered."""
    answers: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = AdapterServiceStub(channel)
        for number in numbers:
            try:
                await begin(stub, "flood", number)
                answers["begun"] += 1
            except grpc.aio.AioRpcError as error:
                answers[type(from_rpc(error)).__name__] += 1
    return answers


async def measure(store: RunningStore, uploads: int) -> dict[str, Any]:
    each = uploads // CONNECTIONS
    before_mib, begun_s = store.resident_mib(), time.monotonic()
    floods = [
        asyncio.create_task(flood(store.address, range(n * each, (n + 1) * each)))
        for n in range(CONNECTIONS)
    ]
    await asyncio.sleep(1.0)
    stub, (_, weights) = AdapterServiceStub(store.channel), files()
    calm_s = time.monotonic()
    upload_id = await begin(stub, "calm", 0)
    upload = upload_adapter(store.channel)
    await upload(requests(upload_id, weights), metadata=bearer("calm"))
    calm_s = time.monotonic() - calm_s
    running = sum(not task.done() for task in floods)
    answers = sum([await task for task in floods], Counter[str]())
    assert answers == {"begun": LIMIT, TenantLimit.__name__: each * CONNECTIONS - LIMIT}, answers
    return {
        "answers": dict(answers),
        "seconds": round(time.monotonic() - begun_s, 1),
        "other_tenants_push_s": round(calm_s, 3),
        "connections_busy_when_it_was_done": running,
        "grown_mib": round(store.resident_mib() - before_mib, 1),
    }


async def run(place: Place, uploads: int) -> dict[str, Any]:
    write_base_model(place.model)
    write_tokens(place.directory / "tokens.json")
    options = ["--tokens", str(place.directory / "tokens.json"), "--tenant-uploads", str(LIMIT)]
    async with started(place, *options, metadata=bearer("calm")) as store:
        return await measure(store, uploads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=10_000)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
    ):
        metrics = asyncio.run(run(Place(Path(directory), Path(shm)), arguments.uploads))
    for key, value in metrics.items():
        print(f"{key:34s} {value}")
    write_result(
        "store-flood",
        benchmark="store_flood",
        device=host_name(),
        config={"uploads": arguments.uploads, "connections": CONNECTIONS, "limit": LIMIT},
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
