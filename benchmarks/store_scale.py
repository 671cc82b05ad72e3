"""A store with ten thousand adapters: registration, lists, memory, start, and its RAM tier.

    python -m benchmarks.store_scale
    python -m benchmarks.store_scale --redis

The store is the real process, called over gRPC; the adapters have ranks 8, 16, 32 and 64 of a tiny
geometry, each with its own bytes. They are registered by a few clients at once, listed in pages and
by label, and the store is started anew with all of them. Then one reader fetches page images by a
Zipf trace, with a budget of a tenth of their bytes. The hit rate is the store's own count; an LRU
cache and one that knows the future are simulated on the same trace. With --redis the adapters are
in a real redis-server of this machine, with its log synchronised at each answer.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cache_simulation import belady_hits, lru_hits
from benchmarks.results_file import host_name, write_result
from benchmarks.store_population import (
    CLIENTS,
    LABELS,
    PAGE_SIZE,
    RANKS,
    Files,
    Reader,
    bytes_of,
    list_all,
    register,
    timed,
)
from benchmarks.store_process import Place, RunningStore, started
from lorry.rpc.base_model import read_base_model
from tests.support.adapter_store import write_base_model
from tests.support.adapters import TINY
from tests.support.redis_server import running_redis

BUDGET_SHARE = 0.1
SIMULATED_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1e3, QUANTILES)
    named = {f"p{q:g}": round(float(v), 3) for q, v in zip(QUANTILES, values, strict=True)}
    return {"count": len(seconds), **named}


def zipf_trace(count: int, length: int, *, seed: int = 42, alpha: float = 1.0) -> list[int]:
    """Adapters in the order in which they are wanted; popularity has nothing to do with rank."""
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, count + 1) ** alpha
    by_popularity = random.permutation(count)
    drawn = random.choice(count, length, p=weights / weights.sum())
    return [int(by_popularity[place]) for place in drawn]


def lookups(store: RunningStore) -> tuple[float, float]:
    """Images that were found in memory, and all that were asked for."""
    scrape, name = store.metrics(), "lorry_store_image_lookups_total"
    return scrape.value(name, state="ready"), scrape.value(name)


async def measure(place: Place, count: int, fetches: int) -> dict[str, Any]:
    model = write_base_model(place.model, TINY)
    digest = read_base_model(model).digest
    metrics = await registration(place, count)
    metrics |= await starts(place)
    versions, listed = await lists(place, count)
    metrics |= listed
    say(metrics)
    metrics |= await fetches_by_tier(place, digest, versions)
    metrics["zipf"] = await trace_of_fetches(place, digest, versions, count, fetches)
    return metrics


async def registration(place: Place, count: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    async with started(place) as store:
        metrics["empty_resident_mib"] = store.resident_mib()
        metrics["empty_start_s"] = store.start_s
        begun_s = time.perf_counter()
        seconds = await register(store, Files.make(), count)
        metrics["registered_per_s"] = count / (time.perf_counter() - begun_s)
        metrics["register_ms"] = quantiles_ms(seconds)
        metrics["registered_resident_mib"] = store.resident_mib()
    return metrics


async def starts(place: Place) -> dict[str, Any]:
    """With all adapters there."""
    seconds, resident_mib = list[float](), 0.0
    for _ in range(5):
        async with started(place) as store:
            seconds.append(store.start_s)
            resident_mib = store.resident_mib()
    start_s = {"median": float(np.median(seconds)), "max": max(seconds)}
    return {"start_s": start_s, "resident_mib": resident_mib}


async def lists(place: Place, count: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The version of each name, and how long pages of them take."""
    async with started(place) as store:
        pages = [await list_all(store) for _ in range(5)]
        filters = [await list_all(store, f'labels.group="{g}"') for g in range(LABELS)]
    versions = pages[0][1]
    assert len(versions) == count
    assert sum(len(found) for _, found in filters) == count
    return versions, {
        "list_page_ms": quantiles_ms([s for seconds, _ in pages for s in seconds]),
        "list_by_label_ms": quantiles_ms([s for seconds, _ in filters for s in seconds]),
    }


async def fetches_by_tier(
    place: Place, digest: bytes, versions: dict[str, bytes]
) -> dict[str, Any]:
    """Of some adapters, each from where it is kept and then from memory."""
    some = range(min(len(versions), 500))
    async with started(place) as store:
        reader = Reader(store, digest, versions)
        kept = [await timed(reader.fetch(n)) for n in some]
        memory = [await timed(reader.fetch(n)) for n in some]
        assert lookups(store) == (len(some), 2 * len(some))
    tier = "redis" if place.redis_url else "disk"
    return {
        f"fetch_from_{tier}_ms": quantiles_ms(kept),
        "fetch_from_memory_ms": quantiles_ms(memory),
    }


async def trace_of_fetches(
    place: Place, digest: bytes, versions: dict[str, bytes], count: int, fetches: int
) -> dict[str, Any]:
    """Hit rates of a store whose memory holds a tenth of the bytes, and of simulated caches."""
    sizes = {number: bytes_of(number) for number in range(count)}
    total_bytes, trace = sum(sizes.values()), zipf_trace(count, fetches)
    budget_bytes = int(BUDGET_SHARE * total_bytes)
    fresh = place.directory / "fresh"
    fresh.mkdir()
    options = ["--ram-bytes", str(budget_bytes), "--memory-dir", str(fresh)]
    async with started(place, *options) as store:
        reader = Reader(store, digest, versions)
        seconds = [await timed(reader.fetch(number)) for number in trace]
        found, wanted = lookups(store)
        used_bytes = store.metrics().value("lorry_store_ram_bytes")
    assert wanted == len(trace)
    assert used_bytes <= budget_bytes
    shares = sorted({*SIMULATED_SHARES, BUDGET_SHARE})
    simulated = {
        f"{share:g}": {
            "lru": lru_hits(trace, sizes, int(share * total_bytes)) / fetches,
            "belady": belady_hits(trace, sizes, int(share * total_bytes)) / fetches,
        }
        for share in shares
    }
    return {
        "image_bytes": total_bytes,
        "budget_bytes": budget_bytes,
        "budget_share": BUDGET_SHARE,
        "fetches": fetches,
        "hit_rate": found / wanted,
        "lru_hit_rate": simulated[f"{BUDGET_SHARE:g}"]["lru"],
        "belady_hit_rate": simulated[f"{BUDGET_SHARE:g}"]["belady"],
        "fetch_ms": quantiles_ms(seconds),
        "simulated_by_budget_share": simulated,
    }


def say(metrics: dict[str, Any]) -> None:
    print(json.dumps(metrics), file=sys.stderr, flush=True)


def rows(metrics: dict[str, Any]) -> Iterator[str]:
    zipf = metrics["zipf"]
    yield f"registered          {metrics['registered_per_s']:8.1f} /s"
    for key, times in metrics.items():
        if key.endswith("_ms"):
            name = key.removesuffix("_ms")
            yield f"{name:19s} {times['p50']:8.2f} ms p50, {times['p99']:.2f} ms p99"
    yield f"start               {metrics['start_s']['median']:8.2f} s"
    yield f"resident            {metrics['resident_mib']:8.1f} MiB"
    yield (
        f"hit rate            {zipf['hit_rate']:8.2%}, LRU {zipf['lru_hit_rate']:.2%}, "
        f"Belady {zipf['belady_hit_rate']:.2%}"
    )


def run(count: int, fetches: int, *, redis: bool) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
        contextlib.ExitStack() as stack,
    ):
        directory, shm_dir = Path(name), Path(shm)
        if not redis:
            return asyncio.run(measure(Place(directory, shm_dir), count, fetches))
        server = stack.enter_context(running_redis(directory / "redis"))
        metrics = asyncio.run(measure(Place(directory, shm_dir, server.url), count, fetches))
        return metrics | {"redis_mib": server.client.info("memory")["used_memory"] / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--fetches", type=int, default=20_000)
    parser.add_argument("--redis", action="store_true", help="keep adapters in a Redis of this run")
    arguments = parser.parse_args()
    metrics = run(arguments.adapters, arguments.fetches, redis=arguments.redis)
    print("\n".join(rows(metrics)))
    write_result(
        "store-scale-redis" if arguments.redis else "store-scale",
        benchmark="store_scale",
        device=host_name(),
        config={
            "adapters": arguments.adapters,
            "ranks": list(RANKS),
            "clients": CLIENTS,
            "page_size": PAGE_SIZE,
            "backend": "redis" if arguments.redis else "file",
            "load_average": os.getloadavg()[0],  # of other work too, where there is some
        },
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
