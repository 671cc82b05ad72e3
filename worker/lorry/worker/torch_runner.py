"""Runs steps by the torch references, one after the other, on any device."""

import numpy as np
import torch

from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.rpc.base_model import BaseModel
from lorry.worker.adapter_memory import DirectAdapterMemory
from lorry.worker.drawn import Drawn, DrawnLogprobs
from lorry.worker.lora_strategies import LoraStrategy
from lorry.worker.model import Decoder
from lorry.worker.plan import Batch
from lorry.worker.prompt_head import PIECE_ROWS
from lorry.worker.prompt_rows import PromptTargets, prompt_targets
from lorry.worker.rope_table import rope_table
from lorry.worker.runner import ReadTokens, RunCounts
from lorry.worker.sequence_adjustments import SequenceAdjustments, StepChange
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_input import StepInput, host_step_arrays, to_step_input
from lorry.worker.step_work import StepWork
from lorry.worker.torch_operations import TorchOperations
from lorry.worker.vocabulary import Vocabulary


class TorchRunner:
    """The model, the pool and the adapters in it; see `Runner`.

    A step is done when `launch` returns. More than one in flight gains nothing, but is as correct
    as on a GPU, which is how the engine's overlap is tested without one.
    """

    def __init__(
        self,
        base_model: BaseModel,
        model: Decoder,
        pool: PoolView,
        *,
        vocabulary: Vocabulary,
        lora: LoraStrategy,
        max_rank: int,
        max_running: int,
        max_in_flight: int = 1,
    ) -> None:
        self.max_in_flight = max_in_flight
        self._num_steps = 0
        self.adapters = DirectAdapterMemory(pool, max_rank=max_rank)
        self._model = model
        self._pool = pool
        self._vocabulary = vocabulary
        self._lora = lora
        dtype, device = TORCH_DTYPES[pool.layout.dtype], pool.slices.device
        self._cos_sin_L2D = rope_table(base_model).to(dtype=dtype, device=device)
        self._options = base_model.options
        self._last_token_R = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._adjustments = SequenceAdjustments(
            max_running, vocabulary.num_columns, device, columns=vocabulary.columns
        )

    @property
    def counts(self) -> RunCounts:
        return RunCounts(graph_replays=0, eager_steps=self._num_steps, padded_rows=0)

    def launch(self, batch: Batch, table: SequenceTable) -> ReadTokens:
        return self.run(self.prepare(batch, table))

    def prepare(self, batch: Batch, table: SequenceTable) -> StepWork:
        return StepWork(
            host_step_arrays(batch, table),
            self._adjustments.change(batch, table),
            None if batch.prompt is None else prompt_targets(batch.prompt, table),
        )

    def run(self, work: StepWork) -> ReadTokens:
        drawn = self._compute(work)
        return lambda: drawn

    @torch.inference_mode()
    def _compute(self, work: StepWork) -> Drawn:
        self._num_steps += 1
        step = to_step_input(work.arrays, self._pool.slices.device)
        operations = TorchOperations(
            step,
            self.adapters.tables,
            self._pool,
            self._cos_sin_L2D,
            self._options,
            self._lora,
        )
        drawn_T = self._last_token_R[(-1 - step.token_id_T).clamp(min=0)]
        token_id_T = torch.where(step.token_id_T >= 0, step.token_id_T, drawn_T)
        x_TH = self._model.forward(token_id_T, operations)
        prompt = None if work.prompt is None else self._report_prompt(x_TH, work.prompt)
        if not len(step.sample_row_N):
            return Drawn(np.empty(0, dtype=np.int32), prompt=prompt)
        logits_NV = self._model.logits(x_TH[step.sample_row_N])
        token_N = self._draw(logits_NV, step, work.adjustments)
        self._last_token_R[step.state_row_N] = token_N
        logprobs = self._vocabulary.report(logits_NV, token_N, step.sampling.num_top_N)
        return Drawn(token_N.int().cpu().numpy(), logprobs, prompt)

    def _draw(
        self, logits_NV: torch.Tensor, step: StepInput, change: StepChange | None
    ) -> torch.Tensor:
        vocabulary = self._vocabulary
        if change is None:
            return vocabulary.draw(logits_NV, step.sampling)
        self._adjustments.apply(change)
        tables, rows = self._adjustments.tables, self._adjustments.of(step.state_row_N)
        token_N = vocabulary.draw(vocabulary.adjust(logits_NV, tables, rows), step.sampling)
        vocabulary.count(tables, rows, token_N)
        return token_N

    def _report_prompt(self, x_TH: torch.Tensor, targets: PromptTargets) -> DrawnLogprobs:
        """Logprobs of prompt tokens, a piece at a time, so that the logits stay few."""
        tensors = [torch.from_numpy(part.astype(np.int64)).to(x_TH.device) for part in targets]
        pieces = []
        for row_P, token_P, num_top_P in zip(*(t.split(PIECE_ROWS) for t in tensors), strict=True):
            logits_PV = self._model.logits(x_TH[row_P])
            pieces.append(self._vocabulary.report(logits_PV, token_P, num_top_P))
        parts = zip(*(piece for piece in pieces if piece is not None), strict=True)
        return DrawnLogprobs(*(np.concatenate(part) for part in parts))
