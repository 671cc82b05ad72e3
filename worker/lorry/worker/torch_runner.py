"""Runs steps by the torch references, one after the other, on any device."""

import numpy as np
import torch

from lorry.kernels.adjustments import adjust_reference, count_drawn
from lorry.kernels.logprobs import logprobs_reference
from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.sampling import sample_reference
from lorry.kernels.truncation import truncation_reference
from lorry.rpc.base_model import BaseModel
from lorry.worker.adapter_memory import DirectAdapterMemory
from lorry.worker.drawn import Drawn, DrawnLogprobs
from lorry.worker.model import Decoder
from lorry.worker.plan import Batch
from lorry.worker.prompt_head import PIECE_ROWS
from lorry.worker.prompt_rows import PromptTargets, prompt_targets
from lorry.worker.rope_table import rope_table
from lorry.worker.runner import ReadTokens, RunCounts
from lorry.worker.sequence_adjustments import SequenceAdjustments
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_input import SamplingInput, build_step_input
from lorry.worker.torch_operations import TorchOperations


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
        max_rank: int,
        max_running: int,
        max_in_flight: int = 1,
    ) -> None:
        self.max_in_flight = max_in_flight
        self._num_steps = 0
        self.adapters = DirectAdapterMemory(pool, max_rank=max_rank)
        self._model = model
        self._pool = pool
        dtype, device = TORCH_DTYPES[pool.layout.dtype], pool.slices.device
        self._cos_sin_L2D = rope_table(base_model).to(dtype=dtype, device=device)
        self._options = base_model.options
        self._last_token_R = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._adjustments = SequenceAdjustments(max_running, base_model.vocab_size, device)

    @property
    def counts(self) -> RunCounts:
        return RunCounts(graph_replays=0, eager_steps=self._num_steps, padded_rows=0)

    def launch(self, batch: Batch, table: SequenceTable) -> ReadTokens:
        self._num_steps += 1
        drawn = self._run(batch, table)
        return lambda: drawn

    @torch.inference_mode()
    def _run(self, batch: Batch, table: SequenceTable) -> Drawn:
        step = build_step_input(batch, table, self._pool.slices.device)
        operations = TorchOperations(
            step, self.adapters.tables, self._pool, self._cos_sin_L2D, self._options
        )
        drawn_T = self._last_token_R[(-1 - step.token_id_T).clamp(min=0)]
        token_id_T = torch.where(step.token_id_T >= 0, step.token_id_T, drawn_T)
        x_TH = self._model.forward(token_id_T, operations)
        prompt = None
        if batch.prompt is not None:
            prompt = self._report_prompt(x_TH, prompt_targets(batch.prompt, table))
        if not len(step.sample_row_N):
            return Drawn(np.empty(0, dtype=np.int32), prompt=prompt)
        logits_NV = self._model.logits(x_TH[step.sample_row_N])
        if self._adjustments.prepare(batch, table):
            tables, rows = self._adjustments.tables, self._adjustments.of(step.state_row_N)
            token_N = draw(adjust_reference(logits_NV, tables, rows), step.sampling)
            count_drawn(tables, rows, token_N)
        else:
            token_N = draw(logits_NV, step.sampling)
        self._last_token_R[step.state_row_N] = token_N
        logprobs = report(logits_NV, token_N, step.sampling.num_top_N)
        return Drawn(token_N.int().cpu().numpy(), logprobs, prompt)

    def _report_prompt(self, x_TH: torch.Tensor, targets: PromptTargets) -> DrawnLogprobs:
        """Logprobs of prompt tokens, a piece at a time, so that the logits stay few."""
        tensors = [torch.from_numpy(part.astype(np.int64)).to(x_TH.device) for part in targets]
        pieces = []
        for row_P, token_P, num_top_P in zip(*(t.split(PIECE_ROWS) for t in tensors), strict=True):
            pieces.append(report(self._model.logits(x_TH[row_P]), token_P, num_top_P))
        parts = zip(*(piece for piece in pieces if piece is not None), strict=True)
        return DrawnLogprobs(*(np.concatenate(part) for part in parts))


def draw(logits_NV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Draw a token for each row."""
    threshold_N = truncation_reference(
        logits_NV,
        sampling.temperature_N,
        sampling.top_k_N,
        sampling.top_p_N,
        sampling.min_p_N,
    )
    return sample_reference(
        logits_NV,
        sampling.temperature_N,
        sampling.seed_N,
        sampling.output_position_N,
        threshold_N,
    )


def report(
    logits_NV: torch.Tensor, token_N: torch.Tensor, num_top_N: torch.Tensor
) -> DrawnLogprobs | None:
    """Logprobs of the model's own logits, if a row asks for any."""
    if not (num_top_N >= 0).any():
        return None
    logprobs = logprobs_reference(logits_NV, token_N, num_top_N)
    return DrawnLogprobs(*(values.cpu().numpy() for values in (num_top_N, *logprobs)))
