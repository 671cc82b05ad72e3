"""What a Redis backend does: weights in and out, changes, and the start with ten thousand adapters.

    python -m benchmarks.store_redis

A real redis-server on this machine, with its log synchronised at each answer. Each round sends the
bytes of an adapter, as a store does with what clients upload, and reads them back, verified, into a
file, as it does before it makes a page image of them. Then each of many names is committed alone,
and told to a second store that waits for it.
"""

import argparse
import hashlib
import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from crc32c import crc32c

from benchmarks.results_file import host_name, spread, write_result
from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.records import Adapter, Content, UploadRecord, Version
from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.backend import RedisBackend
from lorry.rpc.names import AdapterName
from tests.support.adapters import TINY, lora_config
from tests.support.redis_server import RedisServer, running_redis

MIB = 1 << 20
ROUNDS = 5
CONTENT = Content(resolve(lora_config(), TINY), 0)


def opened(server: RedisServer) -> RedisBackend:
    return RedisBackend(RedisAddress.parse(server.url), model_digest=b"m" * 32)


def send(backend: RedisBackend, name: AdapterName, data: bytes) -> tuple[float, Version]:
    """Seconds to upload bytes and keep them, and their version."""
    digest = hashlib.sha256(data).digest()
    record = UploadRecord(
        key=digest.hex(),
        name=name,
        spec=CONTENT.spec,
        weights_bytes=len(data),
        weights_sha256=digest,
        labels={},
        expected_etag="",
        create_time_ns=1,
    )
    started_s = time.perf_counter()
    backend.create_upload(record, num_begun=backend.uploads_of(name.tenant).num_begun)
    for start in range(0, len(data), MIB):
        backend.append(record.key, start, data[start : start + MIB])
    backend.keep(record.key, digest, Content(CONTENT.spec, crc32c(data)))
    seconds = time.perf_counter() - started_s
    version = Version(
        digest=digest,
        max_rank=16,
        modules=("q_proj",),
        weights_bytes=len(data),
        file_bytes=len(data),
        upload=record.key,
        create_time_ns=1,
    )
    return seconds, version


def read(backend: RedisBackend, version: Version) -> float:
    """Seconds until the verified bytes are in a file."""
    started_s = time.perf_counter()
    with backend.weights(version.digest):
        return time.perf_counter() - started_s


def adapter(i: int, version: Version) -> Adapter:
    return Adapter(
        name=AdapterName("default", f"adapter-{i:05}"),
        published=version.digest,
        versions=(version,),
        labels={"team": f"team-{i % 10}"},
        create_time_ns=1,
        update_time_ns=1,
        etag=hashlib.sha256(f"{i}".encode()).hexdigest()[:32],
    )


def commit_all(server: RedisServer, count: int, version: Version) -> dict[str, Any]:
    """Commit names one after another; how fast, and how soon a second store knows each."""
    first, second = opened(server), opened(server)
    position = second.load().position
    told_s: dict[int, float] = {}

    def follow() -> None:
        nonlocal position
        while len(told_s) < count:
            for change in second.wait_for_changes(position):
                told_s[change.revision] = time.perf_counter()
                position = position._replace(revision=change.revision, commit=change.commit)

    follower = threading.Thread(target=follow)
    follower.start()
    done_s: dict[int, float] = {}
    started_s = time.perf_counter()
    for i in range(count):
        each = adapter(i, version)
        done_s[first.commit(each.name, None, each).revision] = time.perf_counter()
    seconds = time.perf_counter() - started_s
    follower.join(60)
    delays_ms = [1e3 * max(0.0, told_s[revision] - done_s[revision]) for revision in done_s]
    cuts = quantiles(delays_ms, n=100)
    first.close()
    second.close()
    return {
        "commits_per_s": round(count / seconds),
        "told_elsewhere_ms": {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2)},
    }


def load_s(server: RedisServer, count: int) -> float:
    """Seconds until a new store knows all names and the last changes."""
    started_s = time.perf_counter()
    backend = opened(server)
    assert len(backend.load().adapters) == count
    seconds = time.perf_counter() - started_s
    backend.close()
    return seconds


def measure(server: RedisServer, mib: int, count: int) -> dict[str, Any]:
    backend = opened(server)
    rates: dict[str, list[float]] = {"write": [], "read": []}
    versions = list[Version]()
    for round_ in range(ROUNDS):
        data = random.Random(round_).randbytes(mib * MIB)
        seconds, version = send(backend, AdapterName("default", "sent"), data)
        versions.append(version)
        rates["write"].append(mib * MIB / seconds / 1e6)
        rates["read"].append(mib * MIB / read(backend, version) / 1e6)
    metrics: dict[str, Any] = {
        f"{name}_mb_per_s": spread(values, digits=0) for name, values in rates.items()
    }
    metrics |= commit_all(server, count, versions[-1])
    metrics["load_s"] = spread([load_s(server, count) for _ in range(ROUNDS)], digits=2)
    backend.close()
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=80, help="of an adapter's weights")
    parser.add_argument("--adapters", type=int, default=10_000, help="names to commit")
    parser.add_argument("--name", default="store-redis", help="of the file in benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, running_redis(Path(directory)) as server:
        redis_version = server.client.info("server")["redis_version"]
        metrics = measure(server, options.mib, options.adapters)
    for name, value in metrics.items():
        print(f"{name:20} {value}")
    write_result(
        options.name,
        benchmark="store_redis",
        device=host_name(),
        config={
            "weights_mib": options.mib,
            "adapters": options.adapters,
            "redis": redis_version,
            "appendfsync": "always",
            "rounds": ROUNDS,
        },
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
