"""Runs steps on a GPU as CUDA-graph replays, one launched before the last one is read."""

from collections.abc import Mapping

import numpy as np
import torch

from lorry.kernels.logprobs import unpacked
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.rpc.base_model import BaseModel
from lorry.worker.cuda_adapter_memory import CudaAdapterMemory
from lorry.worker.device_vocabulary import DeviceVocabulary
from lorry.worker.drawn import Drawn, DrawnLogprobs
from lorry.worker.lora_sharing import LoraSharing
from lorry.worker.model import Decoder
from lorry.worker.plan import Batch
from lorry.worker.prompt_rows import PromptTargets, prompt_targets
from lorry.worker.rope_table import rope_table
from lorry.worker.runner import ReadTokens, RunCounts
from lorry.worker.sequence_adjustments import SequenceAdjustments
from lorry.worker.sequence_pages import SequencePages
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_arrays import head_kind, step_arrays
from lorry.worker.step_buffers import StepBuffers
from lorry.worker.step_graphs import StepGraphs
from lorry.worker.step_work import StepWork
from lorry.worker.transfers import to_host
from lorry.worker.triton_operations import allocate_device_state

MAX_NEW_PAGES = 16384  # that travel with a step's other fields


class CudaRunner:
    """See `Runner`."""

    max_in_flight = 2

    def __init__(
        self,
        base_model: BaseModel,
        model: Decoder,
        pool: PoolView,
        *,
        vocabulary: DeviceVocabulary,
        lora: LoraSharing,
        max_rank: int,
        max_rows: int,
        max_running: int,
        max_context_tokens: int,
        batch_invariant: bool = False,
    ) -> None:
        device = pool.slices.device
        self._base_model, self._model, self._pool = base_model, model, pool
        self._vocabulary, self._lora = vocabulary, lora
        self._max_rows, self._max_running = max_rows, max_running
        self.adapters = CudaAdapterMemory(pool, max_rank=max_rank)
        self._pages = SequencePages(
            max_running, -(-max_context_tokens // pool.layout.page_tokens), device
        )
        self._adjustments = SequenceAdjustments(max_running, base_model.vocab_size, device)
        self.padded_rows = 0
        self._buffers = StepBuffers(
            max_rows=max_rows,
            max_samples=max_running,
            max_new_pages=MAX_NEW_PAGES,
            device=device,
        )
        self.graphs = self.captured(batch_invariant=batch_invariant)

    def captured(self, *, batch_invariant: bool = False, fused: bool = True) -> StepGraphs:
        """Graphs of all steps, over this runner's memory; see `allocate_device_state`."""
        base_model, pool = self._base_model, self._pool
        device, dtype = pool.slices.device, TORCH_DTYPES[pool.layout.dtype]
        state = allocate_device_state(
            pool,
            self.adapters.tables,
            self._pages.table_RP,
            rope_table(base_model).to(dtype=dtype, device=device),
            base_model.options,
            lora=self._lora,
            max_rows=self._max_rows,
            batch_invariant=batch_invariant,
            fused=fused,
        )
        graphs = StepGraphs(
            self._model.with_product(state.product),
            state,
            self._buffers,
            self._adjustments,
            self._vocabulary,
            max_rows=self._max_rows,
            max_samples=self._max_running,
            hidden=base_model.geometry.hidden,
            dtype=dtype,
        )
        with torch.inference_mode():
            graphs.capture()
        return graphs

    @property
    def counts(self) -> RunCounts:
        return RunCounts(self.graphs.replays, eager_steps=0, padded_rows=self.padded_rows)

    def launch(self, batch: Batch, table: SequenceTable) -> ReadTokens:
        return self.run(self.prepare(batch, table))

    def prepare(self, batch: Batch, table: SequenceTable) -> StepWork:
        place_U, page_U = self._pages.changes(batch, table)
        return StepWork(
            step_arrays(batch, table) | {"page_place": place_U, "new_page": page_U},
            self._adjustments.change(batch, table),
            None if batch.prompt is None else prompt_targets(batch.prompt, table),
        )

    @torch.inference_mode()
    def run(self, work: StepWork) -> ReadTokens:
        values, adjustments = work.arrays, work.adjustments
        num_rows = len(values["token_id"])
        rows, samples = self.graphs.padded(num_rows, len(values["sample_row"]))
        self._write(values, rows, samples)
        if adjustments is not None:
            self._adjustments.apply(adjustments)
        groups = self.adapters.groups_of(values["slot"])
        head = head_kind(values, is_adjusted=adjustments is not None)
        self.graphs.replay(rows, samples, groups, head)
        self.padded_rows += rows - num_rows
        return self._reader(values["num_top"], work.prompt)

    def _write(self, values: Mapping[str, np.ndarray], rows: int, samples: int) -> None:
        """Bring a step's fields and new pages to the device."""
        place_U, page_U = values["page_place"], values["new_page"]
        for start in range(MAX_NEW_PAGES, len(place_U), MAX_NEW_PAGES):
            part = slice(start, start + MAX_NEW_PAGES)
            self._pages.write_now(place_U[part], page_U[part])
        first = slice(MAX_NEW_PAGES)
        fields = {**values, "page_place": place_U[first], "new_page": page_U[first]}
        self._buffers.fill(fields, padded_rows=rows, padded_samples=samples)
        self._pages.write(self._buffers.device, len(page_U[first]))

    def _reader(self, num_top_N: np.ndarray, targets: PromptTargets | None) -> ReadTokens:
        head, samples = self.graphs.head, len(num_top_N)
        tokens = to_host(head.token_N[:samples])
        asked = (num_top_N >= 0).any()
        logprobs = to_host(head.logprobs_NY[:samples]) if asked else None
        prompt = self.graphs.report_prompt(targets) if targets is not None else None
        copied = torch.cuda.Event()
        copied.record()

        def read() -> Drawn:
            copied.synchronize()
            return Drawn(
                tokens.numpy().astype(np.int32),
                _reported(num_top_N, logprobs) if logprobs is not None else None,
                _reported(targets.num_top_P, prompt) if targets and prompt is not None else None,
            )

        return read


def _reported(num_top_N: np.ndarray, logprobs_NY: torch.Tensor) -> DrawnLogprobs:
    return DrawnLogprobs(num_top_N, *(values.numpy() for values in unpacked(logprobs_NY)))
