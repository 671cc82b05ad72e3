"""CUDA graphs of whole steps, one for each bucket, with and without LoRA.

A step is two replays: its rows through the layers, then its samples through the head; a third
graph follows, as often as need be, where prompts' logprobs are asked for. All graphs share one
memory pool and the step buffers; replays are ordered by the stream.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import torch

from lorry.kernels.compilation import compile_ahead
from lorry.worker.buckets import bucket_of, bucket_sizes
from lorry.worker.device_vocabulary import DeviceVocabulary
from lorry.worker.graph_capture import capture_graphs
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.model import Decoder
from lorry.worker.progress import counted
from lorry.worker.prompt_head import PromptHead
from lorry.worker.prompt_rows import PromptTargets
from lorry.worker.sequence_adjustments import SequenceAdjustments
from lorry.worker.step_arrays import HeadKind
from lorry.worker.step_buffers import StepBuffers
from lorry.worker.step_head import StepHead
from lorry.worker.triton_operations import DeviceState, TritonOperations

MAX_COMPILERS = 32  # threads, each with an assembler's process: a container may limit both

PROMPT_PIECE = "piece of a prompt's logprobs"
Key = tuple[int, LoraGroups | HeadKind] | str

log = logging.getLogger(__name__)


class StepGraphs:
    """Replays steps, each padded to the bucket that was captured for it."""

    def __init__(
        self,
        model: Decoder,
        state: DeviceState,
        buffers: StepBuffers,
        adjustments: SequenceAdjustments,
        vocabulary: DeviceVocabulary,
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
        self.head = StepHead(
            model, buffers.device, self._hidden_TH, adjustments, vocabulary, max_samples=max_samples
        )
        self._prompt_head = PromptHead(model, self._hidden_TH, vocabulary)
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Compile, warm up and capture everything, largest first so that memory is shared best."""
        with ThreadPoolExecutor(
            min(len(os.sched_getaffinity(0)), MAX_COMPILERS),
            initializer=torch.cuda.set_device,  # by which Triton keeps what they compile
            initargs=(self._hidden_TH.device,),
        ) as threads:
            for kernel in counted(
                log, compile_ahead(self._launch_all, threads), "compiled kernels"
            ):
                kernel.result()
        runs: dict[Key, Callable[[], None]] = {}
        for rows, groups in product(reversed(self.row_buckets), LoraGroups):
            runs[rows, groups] = partial(self._body, rows, groups, self._model)
        for samples, kind in product(reversed(self.sample_buckets), HeadKind):
            runs[samples, kind] = partial(self.head.run, samples, kind)
        runs[PROMPT_PIECE] = self._prompt_head.run
        self._graphs = capture_graphs(runs)

    def close(self) -> None:
        """Free the graphs; the end of a group of ranks waits for those that hold its calls."""
        self._graphs.clear()

    def _launch_all(self) -> None:
        """Launch every kernel as all graphs do; those of the first layer are those of all."""
        first_layer = self._model.first_layer()
        for rows, groups in product(self.row_buckets, LoraGroups):
            self._body(rows, groups, first_layer)
        for samples, kind in product(self.sample_buckets, HeadKind):
            self.head.run(samples, kind)
        self._prompt_head.run()

    def padded(self, rows: int, samples: int) -> tuple[int, int]:
        """The buckets of a step."""
        return (
            bucket_of(rows, self.row_buckets),
            bucket_of(samples, self.sample_buckets) if samples else 0,
        )

    def replay(self, rows: int, samples: int, groups: LoraGroups, head: HeadKind) -> None:
        """Run a step of the buckets `rows` and `samples`."""
        self._graphs[rows, groups].replay()
        if samples:
            self._graphs[samples, head].replay()
        self.replays += 1

    def launch(self, rows: int, samples: int, groups: LoraGroups, head: HeadKind) -> None:
        """The same as `replay` with a launch of each kernel, for comparison."""
        self._body(rows, groups, self._model)
        if samples:
            self.head.run(samples, head)

    def report_prompt(self, targets: PromptTargets) -> torch.Tensor:
        """Packed logprobs of prompt tokens, of the step that was just replayed; see PromptHead."""
        return self._prompt_head.launch(targets, self._graphs[PROMPT_PIECE].replay)

    def _body(self, rows: int, groups: LoraGroups, model: Decoder) -> None:
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
        self._hidden_TH[:rows].copy_(model.forward(token_id, operations))
