"""Runs a step of an engine on a GPU again and again, each time from the same memory."""

from collections.abc import Callable
from typing import Any

import torch

from lorry.worker.cuda_runner import CudaRunner
from tests.support.engines import EngineHarness
from tests.support.step_trace import Step, StepTrace


class StepReplays:
    """Of the engine's last step."""

    def __init__(self, harness: EngineHarness) -> None:
        assert isinstance(harness.engine.runner, CudaRunner)
        graphs: Any = harness.engine.runner.graphs
        self._harness = harness
        self._trace = StepTrace(harness.engine)
        self._graphs = graphs
        self._pool = graphs._state.pool
        adjustments = graphs.head._adjustments
        kept = [*vars(graphs).values(), *vars(graphs.head).values(), *adjustments.tables]
        self._state = [self._pool.slices, *(x for x in kept if isinstance(x, torch.Tensor))]
        self._before: list[torch.Tensor] = []
        self._step: tuple[Any, ...] = ()
        self._replay = graphs.replay
        graphs.replay = self._kept

    def _kept(self, *step: Any) -> None:
        self._before = [tensor.clone() for tensor in self._state]
        self._step = step
        self._replay(*step)

    def run_until(self, wanted: Callable[[Step], bool]) -> None:
        """Run steps; the last one is as `wanted`."""
        while not (self._trace.steps and wanted(self._trace.steps[-1])):
            assert len(self._harness.finished) < len(self._harness.tokens), "there was no such step"
            self._harness.step()

    def differences(self, times: int) -> set[str]:
        """Which results are not, bit for bit, those of the step in each of its repetitions.

        Padded rows are left out, and the dummy page that they all write.
        """
        first = {name: result.clone() for name, result in self._results().items()}
        found = set[str]()
        for _ in range(times):
            for tensor, before in zip(self._state, self._before, strict=True):
                tensor.copy_(before)
            self._replay(*self._step)
            for name, result in self._results().items():
                if not torch.equal(_bits(result), _bits(first[name])):
                    found.add(name)
        return found

    def _results(self) -> dict[str, torch.Tensor]:
        return {
            "hidden states": self._graphs._hidden_TH[: len(self._trace.steps[-1].hidden_TH)],
            "tokens": self._graphs.head.token_N,
            "KV": self._pool.slices[self._pool.layers :],
        }


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN is not equal to itself."""
    return tensor.view(torch.uint8)
