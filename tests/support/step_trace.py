"""What each step of an engine computes, for comparing runs bit for bit and with references."""

import time
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from lorry.worker.adapter_memory import FinishedLoad
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.engine import Engine
from lorry.worker.plan import Batch
from lorry.worker.residency import Adapter
from lorry.worker.sequences import SequenceTable
from tests.support.digest import digest

LOAD_TIMEOUT_S = 60.0


class Step(NamedTuple):
    """Arrays have an entry for each sequence of the step."""

    numbers: np.ndarray  # of the requests
    start: np.ndarray
    length: np.ndarray
    slot: np.ndarray
    hidden_TH: torch.Tensor  # of the rows, normed

    @property
    def is_mixed(self) -> bool:
        """Whether prompt chunks and decodes, of several adapters, are in it."""
        return len(set((self.length > 1).tolist())) == 2 and len(set(self.slot.tolist())) > 2


class StepTrace:
    """Records the steps of an engine from now on; on a GPU without waiting for it."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[Step] = []
        self._runner = cast(Any, engine.runner)
        self._launch = self._runner.launch
        self._runner.launch = self._traced
        self._hidden_TH = torch.empty(0)
        if isinstance(engine.runner, CudaRunner):
            self.model = self._runner.graphs._model
            self._hidden_TH = self._runner.graphs._hidden_TH
        else:
            self.model = self._runner._model
            self._forward = self.model.forward
            self.model.forward = self._keep_hidden

    def _traced(self, batch: Batch, table: SequenceTable) -> Any:
        numbers = table.number_R[batch.row_S].copy()
        read = self._launch(batch, table)
        hidden_TH = self._hidden_TH[: batch.num_tokens].clone()
        self.steps.append(Step(numbers, batch.start_S, batch.length_S, batch.slot_S, hidden_TH))
        return read

    def _keep_hidden(self, *args: Any) -> torch.Tensor:
        self._hidden_TH = self._forward(*args)
        return self._hidden_TH

    def plans(self) -> list[tuple[list[int], ...]]:
        """What was computed in each step, for each sequence."""
        return [
            tuple(array.tolist() for array in (s.numbers, s.start, s.length, s.slot))
            for s in self.steps
        ]

    def digests(self) -> list[str]:
        """Of each step's hidden states."""
        return [digest(step.hidden_TH) for step in self.steps]

    @torch.inference_mode()
    def logits(self, number: int) -> torch.Tensor:
        """Logits of all positions of a request in float32, each as last computed."""
        at: dict[int, torch.Tensor] = {}
        for step in self.steps:
            first = np.cumsum(step.length) - step.length
            for index in np.flatnonzero(step.numbers == number):
                rows = step.hidden_TH[first[index] : first[index] + step.length[index]]
                at.update(enumerate(self.model.logits(rows).float(), int(step.start[index])))
        return torch.stack([at[position] for position in range(len(at))])


class PatientLoads:
    """An adapter memory whose loads take until the next step, so that runs plan the same steps."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._begun = 0

    def begin_load(self, adapter: Adapter) -> None:
        self._memory.begin_load(adapter)
        self._begun += 1

    def finished_loads(self) -> list[FinishedLoad]:
        finished: list[FinishedLoad] = []
        give_up_s = time.monotonic() + LOAD_TIMEOUT_S
        while len(finished) < self._begun:
            assert time.monotonic() < give_up_s, "a load never finished"
            finished += self._memory.finished_loads()
        self._begun = 0
        return finished

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)
