"""What tensor-parallel GPUs take to sum over each other, and for their shares of the products.

    python -m benchmarks.collectives --tensor-parallel 2

Sums are of bf16 rows of a model's width, by NCCL and, where the platform allows it, by the one-shot
kernel of torch's symmetric memory with the copy into its buffer, and by the engine's own kernel,
which adds the residual and takes the norm, too; each is many calls in one CUDA graph. Products are
one rank's, of a few layers that stand for all. Both extend the ideal engine:
``products + sums + bytes read / rate``.
"""

import argparse
import dataclasses
import faulthandler
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear

from benchmarks.building import CONFIGS, device_name
from benchmarks.products import PRODUCTS, Body
from benchmarks.results_file import RESULTS, write_result
from benchmarks.timing import copy_bytes_per_s, interleaved_ms, replayable
from lorry.kernels.page_layout import Dtype, PageLayout, TpStrategy
from lorry.kernels.partition import Partition
from lorry.kernels.rank_sum import ROOMS, Rooms, sum_add_rms_norm
from lorry.rpc.base_model import read_base_model
from lorry.worker.row_sums import open_rooms, rooms_bytes
from lorry.worker.weights import RandomWeights, load_weights

BYTES = [1 << power for power in range(12, 25)]
CALLS = 40  # in a graph
ROUNDS = 7
ROWS = [1, 16, 64, 128, 256, 512, 1024]
LAYERS = 4
MODELS = ["llama-2-13b", "llama-30b", "llama-2-70b", "llama-3-70b"]
ONE_SHOT_BYTES = 1 << 23  # at most
DTYPE = torch.bfloat16
ROW_WIDTH = 4096


def measure_sums(device: torch.device) -> dict[str, dict[int, float]]:
    """Median microseconds of a sum over all ranks, by its bytes; every rank must call it."""
    found: dict[str, dict[int, float]] = {"nccl_us": _time(BYTES, _nccl_sum, device)}
    try:
        small = [size for size in BYTES if size <= ONE_SHOT_BYTES]
        found["one_shot_us"] = _time(small, _one_shot_sum, device)
        of_rows = [size for size in BYTES if size >= ROW_WIDTH * DTYPE.itemsize]
        rooms, _mapped = rooms_of(device)
        found["with_norm_us"] = _time(of_rows, partial(_sum_with_norm, rooms), device)
    except RuntimeError as error:  # of a platform without peer access
        print(f"no one-shot sums: {error}", flush=True)
    return found


def _time(
    sizes: list[int],
    sum_of: Callable[[int, torch.device], Callable[[], object]],
    device: torch.device,
) -> dict[int, float]:
    calls = {size: partial(_repeat, sum_of(size, device)) for size in sizes}
    times = interleaved_ms(replayable(calls, device), device, ROUNDS)
    return {size: round(median(ms) / CALLS * 1e3, 2) for size, ms in times.items()}


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def _nccl_sum(size: int, device: torch.device) -> Callable[[], object]:
    return partial(dist.all_reduce, torch.zeros(size // 2, dtype=DTYPE, device=device))


def _one_shot_sum(size: int, device: torch.device) -> Callable[[], object]:
    from torch.distributed import _symmetric_memory as symmetric

    group = dist.group.WORLD
    assert group is not None
    x = torch.zeros(size // 2, dtype=DTYPE, device=device)
    buffer = symmetric.empty(size // 2, dtype=DTYPE, device=device)
    symmetric.rendezvous(buffer, group.group_name)

    def call() -> None:
        # One that copies, too, tells the others before all of its threads have copied (torch 2.11).
        buffer.copy_(x)
        torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", group.group_name)

    return call


def rooms_of(device: torch.device) -> tuple[Rooms, object]:
    """For sums of any of the sizes; they are there as long as the other object is."""
    from torch.distributed import _symmetric_memory as symmetric

    group = dist.group.WORLD
    assert group is not None
    size, rows = group.size(), max(BYTES) // (ROW_WIDTH * DTYPE.itemsize)
    num_bytes = rooms_bytes(size, rows, ROW_WIDTH, DTYPE)
    own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize(device)
    met = symmetric.rendezvous(own, group.group_name)
    memory = [met.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(size)]
    return open_rooms(memory, group.rank(), rows, ROW_WIDTH, DTYPE), (own, met)


def _sum_with_norm(rooms: Rooms, size: int, device: torch.device) -> Callable[[], object]:
    x_TH = torch.zeros(size // (ROW_WIDTH * DTYPE.itemsize), ROW_WIDTH, dtype=DTYPE, device=device)
    residual_TH, weight_H = (
        torch.zeros_like(x_TH),
        torch.ones(ROW_WIDTH, dtype=DTYPE, device=device),
    )
    turns = itertools.cycle(range(ROOMS))
    return lambda: sum_add_rms_norm(x_TH, rooms, next(turns), residual_TH, weight_H, 1e-5)


def measure_copy(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    return copy_bytes_per_s(torch.empty(8 << 30, dtype=torch.uint8, device=device))


def measure_products(model: str, size: int, device: torch.device) -> dict[str, dict[int, float]]:
    """Median milliseconds of a rank's body and head, by their rows."""
    base_model = read_base_model(CONFIGS / model)
    layers = base_model.geometry.layers
    few = dataclasses.replace(
        base_model, geometry=dataclasses.replace(base_model.geometry, layers=LAYERS)
    )
    layout = PageLayout(
        geometry=few.geometry,
        dtype=Dtype.BF16,
        tp_size=size,
        tp_strategy=TpStrategy.REPLICATED if size > 1 else None,
    )
    weights = load_weights(few, RandomWeights(DTYPE, device), Partition(layout))
    body = Body(weights, layout.local_geometry, max(ROWS))
    launches: dict[tuple[str, int], Callable[[], object]] = {}
    for rows in ROWS:
        launches["body_ms", rows] = partial(body.run, rows, PRODUCTS)
        launches["head_ms", rows] = partial(linear, body.x_TH[:rows], weights.head)
    times = interleaved_ms(replayable(launches, device), device, ROUNDS)
    found: dict[str, dict[int, float]] = {"body_ms": {}, "head_ms": {}}
    for (part, rows), values in times.items():
        scale = layers / LAYERS if part == "body_ms" else 1
        found[part][rows] = round(median(values) * scale, 4)
    return found


def run_rank(rank: int, size: int, port: int) -> dict[str, dict[int, float]]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, device_id=device
    )
    return measure_sums(device)


def run_all(size: int) -> dict[str, dict[int, float]]:
    """The sums as the first rank sees them; the others are processes of their own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.collectives", f"--tensor-parallel={size}"]
    others = [
        subprocess.Popen([*command, f"--rank={rank}", f"--port={port}"]) for rank in range(1, size)
    ]
    try:
        return run_rank(0, size, port)
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(models: Sequence[str], ways: Sequence[int], size: int) -> dict[str, Any]:
    """Sums over `size` GPUs, then one GPU's shares of the models' products."""
    sums = run_all(size) if size > 1 else {}
    for name, times in sums.items():
        print(name, "  ".join(f"{nbytes >> 10} KiB {us}" for nbytes, us in times.items()))
    device = torch.device("cuda", 0)
    copied = measure_copy(device)
    products: dict[int, dict[str, Any]] = {}
    for share in ways:
        products[share] = {model: measure_products(model, share, device) for model in models}
        for model, parts in products[share].items():
            print(f"{model} over {share}", parts["body_ms"], flush=True)
    return {"sums": sums, "products": products, "copy_bytes_per_s": copied}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--tensor-parallel", type=int, default=2, help="GPUs")
    result.add_argument("--model", nargs="+", default=MODELS)
    result.add_argument(
        "--ways", type=int, nargs="+", default=[1, 2, 4, 8], help="shares of the products"
    )
    result.add_argument("--rank", type=int, default=0, help="of a process that this one starts")
    result.add_argument("--port", type=int, help="where the ranks meet")
    result.add_argument("--limit-s", type=int, default=100, help="then say where it hangs, and end")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    return result


def main() -> None:
    arguments = parser().parse_args()
    faulthandler.dump_traceback_later(arguments.limit_s, exit=True)
    size = arguments.tensor_parallel
    if arguments.rank:
        run_rank(arguments.rank, size, arguments.port)
        torch.cuda.synchronize()
        os._exit(0)  # graphs of collectives would delay an orderly end
    metrics = measure(arguments.model, arguments.ways, size)
    write_result(
        f"collectives-{size}",
        benchmark="collectives",
        device=device_name("cuda"),
        config={"tensor_parallel": size, "calls": CALLS, "layers_measured": LAYERS},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
