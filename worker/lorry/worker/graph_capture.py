"""Captures CUDA graphs that share their memory."""

import gc
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from lorry.worker.progress import counted

Key = TypeVar("Key")

log = logging.getLogger(__name__)


def capture_graphs(runs: Mapping[Key, Callable[[], None]]) -> dict[Key, torch.cuda.CUDAGraph]:
    """A graph of each run, in their order; each runs once before, which loads its kernels."""
    memory = torch.cuda.graph_pool_handle()
    # Kernels keep the priority of the stream that they were captured on; the side's is lower.
    stream = torch.cuda.Stream(priority=-1)
    graphs = {}
    gc.collect()
    gc.disable()  # what it frees might be another engine's graphs, which no capture survives
    try:
        for key in counted(log, runs, "captured graphs"):
            run = runs[key]
            run()
            torch.cuda.synchronize()
            graphs[key] = torch.cuda.CUDAGraph()
            # A thread of NCCL's looks at events at any time, which would end a stricter capture.
            with torch.cuda.graph(
                graphs[key], pool=memory, stream=stream, capture_error_mode="thread_local"
            ):
                run()
    finally:
        gc.enable()
    return graphs
