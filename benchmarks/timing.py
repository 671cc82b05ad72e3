"""Time launches on the device as replays of a CUDA graph, so that the host costs nothing."""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import torch

WARMUPS = 2

Key = TypeVar("Key", bound=Hashable)


def graph_us(launches: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median microseconds of one launch; give launches that read different memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches[0]()  # compile outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return median(_times_us(graph.replay, replays)) / len(launches)


def copy_bytes_per_s(buffer: torch.Tensor) -> float:
    """Rate of a copy kernel within `buffer`, bytes read and written."""
    source, target = buffer[: 8 << 30].view(torch.int64).chunk(2)
    times_us = _times_us(lambda: torch.add(source, 1, out=target), 7)
    return 2 * source.nbytes / (median(times_us) * 1e-6)


def _times_us(work: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(WARMUPS):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def matmul_flops_per_s(device: torch.device) -> float:
    """Rate of a large bf16 product of random numbers."""
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / (median(_times_us(lambda: a @ b, 7)) * 1e-6)


def replayable(
    launches: Mapping[Key, Callable[[], object]], device: torch.device
) -> dict[Key, Callable[[], object]]:
    """Replays of a CUDA graph of each; on a CPU the launches themselves."""
    if device.type == "cpu":
        return dict(launches)
    memory = torch.cuda.graph_pool_handle()
    replays = dict[Key, Callable[[], object]]()
    for key, launch in launches.items():
        launch()  # allocates what libraries keep outside the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads of collectives look at events at any time, which would end a stricter capture.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            launch()
        replays[key] = graph.replay
    return replays


def interleaved_ms(
    works: Mapping[Key, Callable[[], object]], device: torch.device, rounds: int
) -> dict[Key, list[float]]:
    """Milliseconds of each in every round; in turns, so that a drift of clocks meets all."""
    _one_round(works.values(), device)
    times = dict[Key, list[float]]({key: [] for key in works})
    for _ in range(rounds):
        for key, elapsed_ms in zip(works, _one_round(works.values(), device), strict=True):
            times[key].append(elapsed_ms)
    return times


def _one_round(works: Iterable[Callable[[], object]], device: torch.device) -> list[float]:
    if device.type == "cpu":
        return [_host_ms(work) for work in works]
    spans = []
    for work in works:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in spans]


def _host_ms(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return (time.perf_counter() - started_s) * 1e3
