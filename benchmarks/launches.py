"""What a step launches on the GPU, as the profiler sees it."""

import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

COLLECTIVE = re.compile("nccl|one_shot|rank_sum", re.IGNORECASE)


def launches_of(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Per step: kernels and copies that ran, what the host launched, and the GPU's busy time.

    That of collectives, waits for other ranks included, is told apart.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = list(profiler.events() or [])
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    copies = [event for event in on_device if event.name.startswith(("Memcpy", "Memset"))]
    calls = [event.name for event in events if event.device_type.name == "CPU"]
    collectives = [event for event in on_device if COLLECTIVE.search(event.name)]
    busy_us = _covered((e.time_range.start, e.time_range.end) for e in on_device)
    return {
        "kernels": (len(on_device) - len(copies)) / steps,
        "copies": len(copies) / steps,
        "graph_launches": sum(name.startswith("cudaGraphLaunch") for name in calls) / steps,
        "eager_launches": sum("LaunchKernel" in name for name in calls) / steps,
        "busy_ms": busy_us / steps / 1e3,
        "collectives": len(collectives) / steps,
        "collectives_ms": sum(e.time_range.elapsed_us() for e in collectives) / steps / 1e3,
    }


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of `spans`."""
    covered, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered
