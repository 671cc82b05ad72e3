"""Time launches on the device as replays of a CUDA graph, so that the host costs nothing."""

from collections.abc import Callable
from statistics import median

import torch

WARMUPS = 2


def graph_us(launches: list[Callable[[], None]], replays: int = 7) -> float:
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
