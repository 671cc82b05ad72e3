"""Runs a batch on the device: inputs, forward pass, sampling."""

import numpy as np
import torch

from lorry.kernels.pool_view import PoolView
from lorry.kernels.sampling import sample_reference
from lorry.worker.adapter_memory import AdapterMemory
from lorry.worker.model import LlamaModel
from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_input import SamplingInput, build_step_input


class Runner:
    """The model, the pool and the adapters in it."""

    def __init__(self, model: LlamaModel, pool: PoolView) -> None:
        self.adapters = AdapterMemory(pool)
        self._model = model
        self._device = pool.slices.device

    def run(self, batch: Batch, table: SequenceTable) -> np.ndarray:
        """Compute a step and return the drawn tokens (int32), one for each sampling sequence."""
        step = build_step_input(batch, table, self._device)
        logits_NV = self._model.forward(step, self.adapters.tables)
        if not len(logits_NV):
            return np.empty(0, dtype=np.int32)
        token_N: np.ndarray = draw(logits_NV, step.sampling).to(torch.int32).cpu().numpy()
        return token_N


def draw(logits_NV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Draw a token for each row, none of those that must not come yet."""
    if sampling.banned_NX is not None:
        row_N1 = torch.arange(len(logits_NV), device=logits_NV.device)[:, None].expand_as(
            sampling.banned_NX
        )
        banned = sampling.banned_NX >= 0
        logits_NV = logits_NV.clone()
        logits_NV[row_N1[banned], sampling.banned_NX[banned]] = -torch.inf
    return sample_reference(
        logits_NV, sampling.temperature_N, sampling.seed_N, sampling.output_position_N
    )
