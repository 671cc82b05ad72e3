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

import numpy as np
import torch

from lorry.kernels.sampling import sample
from lorry.worker.buckets import bucket_of, bucket_sizes
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.model import LlamaModel
from lorry.worker.sequences import NO_TOKEN
from lorry.worker.step_buffers import StepBuffers
from lorry.worker.triton_operations import DeviceState, TritonOperations

MAX_STOP_IDS = 80  # the protocol allows 64 beside the model's end-of-sequence tokens

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
        # The last row of state belongs to nobody; padded samples write there.
        self._last_token_R = torch.zeros(max_samples + 1, dtype=torch.int64, device=device)
        self.token_N = torch.zeros(max_samples, dtype=torch.int64, device=device)
        self._banned_NX = torch.full(
            (max_samples, MAX_STOP_IDS), NO_TOKEN, dtype=torch.int64, device=device
        )
        self._has_banned = False
        self._bodies: dict[tuple[int, LoraGroups], torch.cuda.CUDAGraph] = {}
        self._heads: dict[int, torch.cuda.CUDAGraph] = {}

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
        for rows in reversed(self.row_buckets):
            for groups in LoraGroups:
                run = partial(self._body, rows, groups)
                self._bodies[rows, groups] = _captured(run, memory)
            log.info("captured steps of %d rows: %.1f s", rows, time.monotonic() - started_s)
        for samples in reversed(self.sample_buckets):
            self._heads[samples] = _captured(partial(self._head, samples), memory)
        count = len(self._bodies) + len(self._heads)
        log.info("captured %d graphs in %.1f s", count, time.monotonic() - started_s)

    def padded(self, rows: int, samples: int) -> tuple[int, int]:
        """The buckets of a step."""
        return (
            bucket_of(rows, self.row_buckets),
            bucket_of(samples, self.sample_buckets) if samples else 0,
        )

    def replay(self, rows: int, samples: int, groups: LoraGroups) -> None:
        """Run a step of the buckets `rows` and `samples`."""
        self._bodies[rows, groups].replay()
        if samples:
            self._heads[samples].replay()
        self.replays += 1

    def set_banned(self, banned_NX: np.ndarray | None) -> None:
        """Token ids that the next step's samples must not draw; NO_TOKEN where there is none."""
        if banned_NX is not None or self._has_banned:
            self._banned_NX.fill_(NO_TOKEN)
        if banned_NX is not None:
            samples, width = banned_NX.shape
            ids = torch.from_numpy(banned_NX.astype(np.int64)).pin_memory()
            self._banned_NX[:samples, :width].copy_(ids, non_blocking=True)
        self._has_banned = banned_NX is not None

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
        drawn = self._last_token_R[(-1 - token_id).clamp(min=0)]
        token_id = torch.where(token_id >= 0, token_id, drawn)
        self._hidden_TH[:rows].copy_(self._model.forward(token_id, operations))

    def _head(self, samples: int) -> None:
        """The samples' hidden states through the head and the sampler, into `token_N`."""
        buffers = {name: buffer[:samples] for name, buffer in self._buffers.items()}
        logits_NV = self._model.logits(self._hidden_TH[buffers["sample_row"]])
        banned_NX = self._banned_NX[:samples]
        penalty_NX = torch.where(banned_NX >= 0, -torch.inf, 0.0).to(logits_NV.dtype)
        logits_NV.scatter_add_(1, banned_NX.clamp(min=0), penalty_NX)
        sample(
            logits_NV,
            buffers["temperature"],
            buffers["seed"],
            buffers["output_position"],
            self.token_N[:samples],
        )
        self._last_token_R[buffers["state_row"]] = self.token_N[:samples]


def _captured(run: Callable[[], None], memory: Any) -> torch.cuda.CUDAGraph:
    """The graph of `run`, which runs once before to compile its kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        run()
    return graph
