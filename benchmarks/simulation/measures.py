"""What a modelled worker counts, and what it measures of itself as the engine does."""

from dataclasses import dataclass, field

from lorry.worker.step_fit import StepFit

SMOOTHING = 0.1  # of the averages in a worker's status, as the engine's


@dataclass(slots=True)
class WorkerCounts:
    steps: int = 0
    busy_s: float = 0.0
    preemptions: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class Measures:
    """Moving averages, 0 until the first measurement."""

    prefill_tokens_per_s: float = 0.0
    step_s: dict[int, float] = field(default_factory=dict)  # of steps without prompts, by rows
    _fit: StepFit = field(default_factory=StepFit)

    def note(self, rows: int, seconds: float, *, has_prompts: bool) -> None:
        self._fit.note(rows, seconds)
        if has_prompts:
            rate = self._fit.rows_per_s(rows, seconds)
            self.prefill_tokens_per_s = _average(self.prefill_tokens_per_s, rate)
        else:
            point = 1 << (rows - 1).bit_length()
            self.step_s[point] = _average(self.step_s.get(point, 0.0), seconds)


def _average(before: float, value: float) -> float:
    return before + SMOOTHING * (value - before) if before else value
