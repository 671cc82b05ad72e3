"""How much later a cold adapter's first token comes than a warm one's, by where the adapter lies.

    python -m benchmarks.cold_tiers --model llama-3-8b
    python -m benchmarks.cold_tiers --model llama-3-8b --redis

Store, worker and router are the real processes, on a model of random weights; a request comes alone
and its time is the client's. Warm is an adapter that is on the GPU; a cold one was never asked for
at this worker. It lies in the store's memory, as a page image; or on its disk, as it was uploaded,
and out of the page cache (POSIX_FADV_DONTNEED before the request; RWF_NOWAIT tells whether that
worked), though the disk of a virtual machine may be in its host's; or in a Redis on this machine.
Each round asks for a warm one before each cold one.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.building import device_name
from benchmarks.results_file import RESULTS, spread, write_result
from benchmarks.served import Served, ServedOptions, native_layout, served, tokenized_model
from lorry.adapter_store.backend import Backend
from lorry.adapter_store.backend_url import BackendUrl
from lorry.adapter_store.copying import Copy
from lorry.adapter_store.dummy_backend import DummyAdapters, DummyBackend
from lorry.adapter_store.file_backend import WEIGHTS
from lorry.adapter_store.records import Adapter
from lorry.client import Client, Request
from lorry.kernels.page_layout import MODULES
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.channel import open_channel
from lorry.rpc.layout import layout_to_proto
from lorry.rpc.weight_chunk import fetch_adapter
from lorry.v1 import adapter_data_service_pb2 as data_pb
from tests.support.redis_server import running_redis

MEMORY, DISK, REDIS = "memory", "disk", "redis"
PROMPT = list(range(3, 19))
OUTPUT_TOKENS = 4
PROBED_BYTES = 4096
CONFIG = ("model", "device", "rank", "rounds")


@dataclass(slots=True)
class Seen:
    """Times to first token of one tier's pairs, in the order of the rounds."""

    warm_s: list[float] = field(default_factory=list)
    cold_s: list[float] = field(default_factory=list)
    cached: int = 0  # of those that should not have been in the page cache

    def metrics(self) -> dict[str, Any]:
        later_ms = [(c - w) * 1e3 for w, c in zip(self.warm_s, self.cold_s, strict=True)]
        return {
            "warm_ms": spread([s * 1e3 for s in self.warm_s], digits=2),
            "cold_ms": spread([s * 1e3 for s in self.cold_s], digits=2),
            "later_ms": spread(later_ms, digits=2),
            "later_ms_of_all": [round(each, 2) for each in later_ms],
            "cached": self.cached,
        }


class Tiers:
    """The adapters of one store: the first one is warm, the others are for the tiers in turns."""

    def __init__(self, client: Client, adapters: Sequence[Adapter], tiers: Sequence[str]) -> None:
        self._client = client
        self._warm, *cold = adapters
        self.cold = {tier: cold[place :: len(tiers)] for place, tier in enumerate(tiers)}

    async def measure(self, directory: Path) -> dict[str, Seen]:
        """`directory` is that of the store's file:// backend, if it has one."""
        seen = {tier: Seen() for tier in self.cold}
        await self._ttft_s(self._warm)
        for tier, (first, *_) in self.cold.items():  # what only a first request has to wait for
            await self._ask(first, tier, directory, Seen())
        for turn in zip(*(adapters[1:] for adapters in self.cold.values()), strict=True):
            for tier, adapter in zip(self.cold, turn, strict=True):
                seen[tier].warm_s.append(await self._ttft_s(self._warm))
                await self._ask(adapter, tier, directory, seen[tier])
        return seen

    async def _ask(self, adapter: Adapter, tier: str, directory: Path, seen: Seen) -> None:
        if tier == DISK:
            seen.cached += drop_from_cache(
                directory / "versions" / adapter.published.hex() / WEIGHTS
            )
        seen.cold_s.append(await self._ttft_s(adapter))

    async def _ttft_s(self, adapter: Adapter) -> float:
        request = Request(
            prompt=PROMPT,
            adapter=str(adapter.name),
            max_tokens=OUTPUT_TOKENS,
            temperature=0.0,
            ignore_eos=True,
        )
        sent_s, first_s = time.perf_counter(), 0.0
        async with self._client.stream(request) as stream:
            async for chunk in stream:
                if chunk.token_ids and not first_s:
                    first_s = time.perf_counter()
        return first_s - sent_s


def drop_from_cache(path: Path) -> bool:
    """Whether the page cache still holds the beginning of the file afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [bytearray(PROBED_BYTES)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def populated(backend: Backend, model: BaseModel, count: int, rank: int) -> list[Adapter]:
    """Fill a backend with random adapters of all modules."""
    dummy = DummyAdapters(count=count, ranks=(rank,))
    source = DummyBackend(dummy, model.geometry, model_digest=model.digest, scratch_dir=None)
    copy = Copy(source, backend, replace=False)
    for step in copy.steps:
        copy.run(step, lambda num_bytes: None)
    return [step.adapter for step in copy.steps]


async def build_images(services: Served, adapters: Sequence[Adapter], layout: Any) -> None:
    """Have the store make page images, by fetching them as a worker elsewhere would."""
    async with open_channel(services.endpoints.store) as channel:
        fetch = fetch_adapter(channel)
        for adapter in adapters:
            request = data_pb.FetchAdapterRequest(version=adapter.published, layout=layout)
            async for _ in fetch(request):
                pass


async def measure_store(
    arguments: argparse.Namespace, model: BaseModel, url: str, tiers: Sequence[str], directory: Path
) -> dict[str, Seen]:
    """A store of one backend, and all of its tiers."""
    layout = native_layout(model, arguments.device)
    parsed, count = BackendUrl.parse(url), 1 + len(tiers) * (1 + arguments.rounds)
    with contextlib.closing(parsed.open(model_digest=model.digest)) as backend:
        adapters = populated(backend, model, count, arguments.rank)
    options = ServedOptions(
        model=model.directory,
        device=arguments.device,
        backend=url,
        ram_bytes=(count + 1) * layout.pages(MODULES, arguments.rank) * layout.page_bytes,
        worker=arguments.worker_options,
    )
    async with served(options, directory) as services:
        endpoints = services.endpoints
        async with Client(router=endpoints.router, store=endpoints.store) as client:
            asked = Tiers(client, adapters, tiers)
            in_memory = asked.cold.get(MEMORY, [])
            await build_images(services, in_memory, layout_to_proto(layout, model.digest))
            return await asked.measure(parsed.directory or directory)


async def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    model = read_base_model(tokenized_model(arguments.model, directory))
    with backend_of(arguments, directory) as (url, tiers):
        seen = await measure_store(arguments, model, url, tiers, directory)
    return {tier: each.metrics() for tier, each in seen.items()}


@contextlib.contextmanager
def backend_of(
    arguments: argparse.Namespace, directory: Path
) -> Iterator[tuple[str, Sequence[str]]]:
    """Its URL, and the tiers that can be told with it."""
    if not arguments.redis:
        yield (directory / "adapters").as_uri(), (MEMORY, DISK)
        return
    with running_redis(directory / "redis") as server:
        yield server.url, (MEMORY, REDIS)


def _print(metrics: dict[str, Any]) -> None:
    for tier, figures in metrics.items():
        parts = (
            f"{name.removesuffix('_ms')} {figures[name]['median']:.1f} "
            f"({figures[name]['min']:.1f} to {figures[name]['max']:.1f})"
            for name in ("warm_ms", "cold_ms", "later_ms")
        )
        print(f"{tier:7} ms: {', '.join(parts)}; {figures['cached']} in the page cache", flush=True)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", default="llama-3-8b", help="a directory of benchmarks/models")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--rounds", type=int, default=20)
    result.add_argument("--redis", action="store_true", help="keep adapters in a Redis of this run")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    result.add_argument("worker_options", nargs="*", help="after --, for the worker")
    return result


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="lorry-cold-tiers-") as directory:
        metrics = asyncio.run(measure(arguments, Path(directory)))
    _print(metrics)
    write_result(
        f"cold-tiers-{Path(arguments.model).name}{'-redis' if arguments.redis else ''}",
        benchmark="cold_tiers",
        device=device_name(arguments.device),
        config={
            **{name: getattr(arguments, name) for name in CONFIG},
            "modules": list(MODULES),
        },
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
