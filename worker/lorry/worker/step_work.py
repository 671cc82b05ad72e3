"""What a step needs of the host, made once and run by every tensor-parallel rank."""

from typing import NamedTuple

import numpy as np

from lorry.worker.prompt_rows import PromptTargets
from lorry.worker.sequence_adjustments import StepChange


class StepWork(NamedTuple):
    arrays: dict[str, np.ndarray]  # of `host_step_arrays`, or of `step_arrays` and new pages
    adjustments: StepChange | None
    prompt: PromptTargets | None
