"""Runs steps by the torch references, one after the other, on any device."""

import numpy as np
import torch

from lorry.kernels.pool_view import TORCH_DTYPES, PoolView
from lorry.kernels.sampling import sample_reference
from lorry.rpc.base_model import BaseModel
from lorry.worker.adapter_memory import DirectAdapterMemory
from lorry.worker.model import LlamaModel, norm_epsilon, rope_table
from lorry.worker.plan import Batch
from lorry.worker.runner import ReadTokens
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_input import SamplingInput, build_step_input
from lorry.worker.torch_operations import TorchOperations


class TorchRunner:
    """The model, the pool and the adapters in it; see `Runner`."""

    max_in_flight = 1

    def __init__(
        self, base_model: BaseModel, model: LlamaModel, pool: PoolView, *, max_rank: int
    ) -> None:
        self.adapters = DirectAdapterMemory(pool, max_rank=max_rank)
        self._model = model
        self._pool = pool
        dtype, device = TORCH_DTYPES[pool.layout.dtype], pool.slices.device
        self._cos_sin_L2D = rope_table(base_model).to(dtype=dtype, device=device)
        self._epsilon = norm_epsilon(base_model)

    def launch(self, batch: Batch, table: SequenceTable) -> ReadTokens:
        tokens = self._run(batch, table)
        return lambda: tokens

    @torch.inference_mode()
    def _run(self, batch: Batch, table: SequenceTable) -> np.ndarray:
        step = build_step_input(batch, table, self._pool.slices.device)
        operations = TorchOperations(
            step, self.adapters.tables, self._pool, self._cos_sin_L2D, self._epsilon
        )
        x_TH = self._model.forward(step.token_id_T, operations)
        if not len(step.sample_row_N):
            return np.empty(0, dtype=np.int32)
        logits_NV = self._model.logits(x_TH[step.sample_row_N])
        token_N: np.ndarray = draw(logits_NV, step.sampling).to(torch.int32).cpu().numpy()
        return token_N


def draw(logits_NV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Draw a token for each row, none of those that must not come yet."""
    if sampling.banned_NX is not None:
        row_N1 = torch.arange(len(logits_NV), device=logits_NV.device)[:, None]
        banned = sampling.banned_NX >= 0
        row_NX = row_N1.expand_as(sampling.banned_NX)
        logits_NV[row_NX[banned], sampling.banned_NX[banned]] = -torch.inf
    return sample_reference(
        logits_NV, sampling.temperature_N, sampling.seed_N, sampling.output_position_N
    )
