"""CUDA graphs of whole steps, one for each bucket, with and without LoRA.

A step is two replays: its rows through the layers, then its samples through the head. All graphs
share one memory pool and the step buffers; replays are ordered by the stream.
"""

import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lorry.worker.buckets import bucket_of, bucket_sizes
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.model import LlamaModel
from lorry.worker.step_arrays import HeadKind
from lorry.worker.step_buffers import StepBuffers
from lorry.worker.step_head import StepHead
from lorry.worker.triton_operations import DeviceState, TritonOperations

log = logging.getLogger(__name__)


class StepGraphs:
    """Replays a captured step, or runs one eagerly where there is no bucket for it."""

    def __init__(
        self,
        model: LlamaModel,
        state: DeviceState,
        buffers: StepBuffers,
        *,
        max_rows: int,
        max_samples: int,
        hidden: int,
        dtype: torch.dtype,
    ) -> None:
        device = state.pool.slices.device
        self.row_buckets = bucket_sizes(max_rows)
        self.sample_buckets = bucket_sizes(max_samples)
        self.replays = 0
        self._model = model
        self._state = state
        self._buffers = buffers.device
        self._hidden_TH = torch.zeros(max_rows, hidden, dtype=dtype, device=device)
        self.head = StepHead(model, buffers.device, self._hidden_TH, max_samples=max_samples)
        self._bodies: dict[tuple[int, LoraGroups], torch.cuda.CUDAGraph] = {}
        self._heads: dict[tuple[int, HeadKind], torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Warm up and capture everything, largest first so that memory is shared best."""
        gc.collect()
        gc.disable()  # what it frees might be another engine's graphs, which no capture survives
        try:
            self._capture()
        finally:
            gc.enable()

    def _capture(self) -> None:
        started_s = time.monotonic()
        memory = torch.cuda.graph_pool_handle()
        # Kernels keep the priority of the stream that they were captured on; the side's is lower.
        stream = torch.cuda.Stream(priority=-1)
        for rows in reversed(self.row_buckets):
            for groups in LoraGroups:
                run = partial(self._body, rows, groups)
                self._bodies[rows, groups] = _captured(run, memory, stream)
            log.info("captured steps of %d rows: %.1f s", rows, time.monotonic() - started_s)
        for samples in reversed(self.sample_buckets):
            for kind in HeadKind:
                run = partial(self.head.run, samples, kind)
                self._heads[samples, kind] = _captured(run, memory, stream)
        count = len(self._bodies) + len(self._heads)
        log.info("captured %d graphs in %.1f s", count, time.monotonic() - started_s)

    def padded(self, rows: int, samples: int) -> tuple[int, int]:
        """The buckets of a step."""
        return (
            bucket_of(rows, self.row_buckets),
            bucket_of(samples, self.sample_buckets) if samples else 0,
        )

    def replay(self, rows: int, samples: int, groups: LoraGroups, head: HeadKind) -> None:
        """Run a step of the buckets `rows` and `samples`."""
        self._bodies[rows, groups].replay()
        if samples:
            self._heads[samples, head].replay()
        self.replays += 1

    def _body(self, rows: int, groups: LoraGroups) -> None:
        """The rows through the layers, into the hidden states."""
        buffers = {name: buffer[:rows] for name, buffer in self._buffers.items()}
        operations = TritonOperations(
            self._state,
            position_T=buffers["position"],
            page_T=buffers["page"],
            sequence_T=buffers["sequence"],
            slot_T=buffers["slot"],
            groups=groups,
        )
        token_id = buffers["token_id"]
        drawn = self.head.last_token_R[(-1 - token_id).clamp(min=0)]
        token_id = torch.where(token_id >= 0, token_id, drawn)
        self._hidden_TH[:rows].copy_(self._model.forward(token_id, operations))


def _captured(
    run: Callable[[], None], memory: Any, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """The graph of `run`, which runs once before to compile its kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, stream=stream):
        run()
    return graph
