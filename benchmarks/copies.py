"""How fast adapters reach the GPU, and what that costs the steps beside it.

    python -m benchmarks.copies

Page images lie in shared memory, a file each, as the store keeps them. The very `AdapterMemory` of
the engine copies them into pages of a pool: in runs of consecutive pages or scattered, from files
that are registered for DMA or staged. A rate counts from the first load's begin until the engine
may use the last. The pauses are those that a loop of steps sees while files are registered and
copied, beside the same loop left alone.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch

from benchmarks.building import CONFIGS, GIB, device_name
from benchmarks.random_images import RandomImages, image_directory
from benchmarks.results_file import RESULTS, write_result
from lorry.kernels.page_layout import PageLayout
from lorry.kernels.pool_view import PoolView, allocate_pool
from lorry.rpc.base_model import read_base_model
from lorry.rpc.service_config import DTYPES
from lorry.worker.adapter_memory import AdapterMemory, DirectAdapterMemory
from lorry.worker.cuda_adapter_memory import NEVER, REGISTER_READ_ONLY, CudaAdapterMemory
from lorry.worker.host_images import map_file
from lorry.worker.residency import Adapter

MAX_RANK = 64
STEP_MS = 5.0  # of the loop that is watched for pauses
PLACES = ("consecutive", "scattered")
FIRST_TIME = "scattered, first time"


def measure_model(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Copy rates of every rank, kind of memory and places, in turns."""
    base_model = read_base_model(CONFIGS / model)
    layout = PageLayout(geometry=base_model.geometry, dtype=DTYPES[arguments.dtype])
    num_pages = int(arguments.pool_gib * GIB) // layout.page_bytes
    pool = allocate_pool(num_pages, layout, torch.device(arguments.device))
    found = []
    for rank in arguments.ranks:
        with image_directory() as directory:
            image_bytes = RandomImages.image_bytes(layout, rank)
            adapters = max(1, int(arguments.gib * GIB) // image_bytes)
            images = RandomImages(directory, layout, [rank], adapters, apart=True)
            rates = _rates(_memories(pool), images, adapters, num_pages, arguments.rounds)
            for (memory, places), values in rates.items():
                case = {"model": Path(model).name, "rank": rank, "memory": memory, "places": places}
                found.append(case | {"image_mib": image_bytes / 2**20, "gb_per_s": spread(values)})
                print("  ".join(map(str, found[-1].values())), flush=True)
    return found


def _memories(pool: PoolView) -> dict[str, AdapterMemory]:
    if not pool.slices.is_cuda:
        return {"direct": DirectAdapterMemory(pool, max_rank=MAX_RANK)}
    return {
        "registered": CudaAdapterMemory(pool, max_rank=MAX_RANK, registered_from_load=1),
        "staged": CudaAdapterMemory(pool, max_rank=MAX_RANK, registered_from_load=NEVER),
    }


def _rates(
    memories: Mapping[str, AdapterMemory],
    images: RandomImages,
    adapters: int,
    num_pages: int,
    rounds: int,
) -> dict[tuple[str, str], list[float]]:
    """GB/s of loading all adapters, in every round; the first time, which may register, apart."""
    cases = list(itertools.product(memories, PLACES))
    loads = {places: _adapters(images, adapters, num_pages, places) for places in PLACES}
    rates = dict[tuple[str, str], list[float]]()
    giga_bytes = sum(images.image(index).image_bytes for index in range(adapters)) / 1e9
    for name, memory in memories.items():
        for index in range(adapters):
            memory.map(images.image(index))
        rates[name, FIRST_TIME] = [giga_bytes / _load_seconds(memory, loads["scattered"])]
    for _ in range(rounds):
        for name, places in cases:
            seconds = _load_seconds(memories[name], loads[places])
            rates.setdefault((name, places), []).append(giga_bytes / seconds)
    for memory in memories.values():
        for index in range(adapters):
            memory.unmap(images.version(index))
    return rates


def _adapters(images: RandomImages, adapters: int, num_pages: int, places: str) -> list[Adapter]:
    """Adapters with pages and slots."""
    pages = np.arange(1, num_pages)
    if places == "scattered":
        pages = np.random.default_rng(0).permutation(pages)
    found, first = [], 0
    for index in range(adapters):
        image = images.image(index)
        mine = pages[first : first + image.pages].tolist()
        assert len(mine) == image.pages, "the pool is smaller than the images"
        found.append(Adapter(image.version, image=image, pages=mine, slot=index))
        first += image.pages
    return found


def _load_seconds(memory: AdapterMemory, adapters: list[Adapter]) -> float:
    started_s = time.perf_counter()
    for adapter in adapters:
        memory.begin_load(adapter)
    left = len(adapters)
    while left:
        left -= len(memory.finished_loads())
        time.sleep(20e-6)
    return time.perf_counter() - started_s


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def measure_registration(mib: int, rounds: int) -> dict[str, Any]:
    """Milliseconds in which the driver takes a file of `mib` MiB and gives it back."""
    runtime: Any = torch.cuda.cudart()
    taken, given_back = [], []
    with image_directory() as directory:
        path = directory / "file"
        path.write_bytes(bytes(mib << 20))
        for _ in range(rounds):
            data = map_file(path)
            started_s = time.perf_counter()
            error = runtime.cudaHostRegister(data.data_ptr(), len(data), REGISTER_READ_ONLY)
            taken_s = time.perf_counter()
            if int(error):
                return {"mib": mib, "error": int(error)}
            runtime.cudaHostUnregister(data.data_ptr())
            taken.append((taken_s - started_s) * 1e3)
            given_back.append((time.perf_counter() - taken_s) * 1e3)
    return {"mib": mib, "register_ms": spread(taken), "unregister_ms": spread(given_back)}


def measure_pauses(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a loop's steps: alone, and while another thread loads images."""
    base_model = read_base_model(CONFIGS / arguments.model[-1])
    layout = PageLayout(geometry=base_model.geometry, dtype=DTYPES[arguments.dtype])
    pool = allocate_pool(4096, layout, torch.device("cuda"))
    found: dict[str, Any] = {}
    steps = _Steps()
    with image_directory() as directory:
        images = RandomImages(directory, layout, [16], 16, apart=True)
        loads = _adapters(images, 16, pool.num_pages, "scattered")
        memories = _memories(pool)
        for name in ("alone", *memories, "alone again"):
            with _loading(memories.get(name), images, loads) as done:
                times_ms = steps.times_ms(arguments.seconds)
            found[name] = {"loads": len(done)} | {
                f"p{share:g}": float(np.percentile(times_ms, share)) for share in (50, 99, 100)
            }
            print(f"steps beside loads, {name}: {found[name]}", flush=True)
    return found


class _Steps:
    """A loop that launches a step while the one before runs, as the engine does."""

    def __init__(self) -> None:
        a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        products = int(STEP_MS / 0.2)  # at some 0.2 ms each
        torch.mm(a, b)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(products):
                torch.mm(a, b)

    def times_ms(self, seconds: float) -> list[float]:
        before, times = self._launch(), list[float]()
        last_s = end_s = time.perf_counter()
        end_s += seconds
        while last_s < end_s:
            launched = self._launch()
            before.synchronize()
            before, now_s = launched, time.perf_counter()
            times.append((now_s - last_s) * 1e3)
            last_s = now_s
        torch.cuda.synchronize()
        return times

    def _launch(self) -> torch.cuda.Event:
        self._graph.replay()
        done = torch.cuda.Event()
        done.record()
        return done


@contextmanager
def _loading(
    memory: AdapterMemory | None, images: RandomImages, loads: list[Adapter]
) -> Iterator[list[Adapter]]:
    """While the block runs, a thread maps, loads and unmaps one image after the other."""
    stop, done = Event(), list[Adapter]()

    def load() -> None:
        for index in itertools.cycle(range(len(loads))):
            if memory is None or stop.wait(0.05):
                return
            memory.map(images.image(index))
            _load_seconds(memory, [loads[index]])
            memory.unmap(images.version(index))
            done.append(loads[index])

    thread = Thread(target=load)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument(
        "--model", nargs="+", default=["llama-2-7b", "llama-3-8b"], help="of benchmarks/models"
    )
    result.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    result.add_argument("--gib", type=float, default=1.0, help="of images loaded in a round")
    result.add_argument("--pool-gib", type=float, default=16.0)
    result.add_argument("--rounds", type=int, default=5)
    result.add_argument("--seconds", type=float, default=2.0, help="of each loop of steps")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


def main() -> None:
    arguments = parser().parse_args()
    metrics: dict[str, Any] = {"loads": []}
    for model in arguments.model:
        metrics["loads"] += measure_model(model, arguments)
    if arguments.device == "cuda":
        metrics["registration"] = [measure_registration(mib, 5) for mib in (26, 1024)]
        metrics["steps_ms"] = measure_pauses(arguments)
    write_result(
        "copies",
        benchmark="copies",
        device=device_name(arguments.device),
        config={"ranks": arguments.ranks, "gib": arguments.gib, "rounds": arguments.rounds},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
