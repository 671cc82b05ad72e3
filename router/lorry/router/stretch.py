"""How fast a worker's tokens follow each other, beside how long it says that its steps take."""

import math

from lorry.router.request import Request

MEMORY_STEPS = 64.0  # what lies longer back counts less than a third
MOST = 10.0  # that one token counts, so that a pilot that was preempted tells little


class Stretch:
    """By how much the tokens of running requests take longer than steps of decodes alone.

    Prompts share the steps, others the machine, and what a worker measured may be old. One running
    request, the pilot, tells of all: each step draws a token of each.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self.pilot: Request | None = None
        self._drawn_s: float | None = None  # when its last token came, once it is followed
        self._num_drawn = 0

    def follow(self, pilot: Request | None) -> None:
        self.pilot, self._drawn_s = pilot, None

    def draw(self, step_s: float, now_s: float) -> None:
        """The pilot has drawn tokens, in steps that should take `step_s` each."""
        assert self.pilot is not None
        num_drawn = len(self.pilot.output_ids)
        num_steps = num_drawn - self._num_drawn
        if self._drawn_s is not None and num_steps:
            left = math.exp(-num_steps / MEMORY_STEPS)
            gap_s = (now_s - self._drawn_s) / num_steps
            self.factor = left * self.factor + (1.0 - left) * min(MOST, gap_s / step_s)
        self._drawn_s, self._num_drawn = now_s, num_drawn
