"""How fast a worker's tokens follow each other, beside how long it says that its steps take."""

import math

from lorry.router.request import Request

MEMORY_STEPS = 64.0  # of the mean; what lies longer back counts less than a third
LATELY_S = 0.3  # likewise of what is latest
MOST = 10.0  # that one token counts, so that a pilot that was preempted tells little


class Stretch:
    """By how much the tokens of running requests take longer than steps of decodes alone.

    Prompts share the steps, others the machine, and what a worker measured may be old. One running
    request, the pilot, tells of all: each step draws a token of each.

    The mean tells what the tokens of a whole output take. A first token comes of the next step or
    two, which take what the latest ones took: soon twice the mean when a burst begins.
    """

    def __init__(self) -> None:
        self.mean = 1.0
        self._taken_s = self._planned_s = LATELY_S  # by the latest steps
        self.pilot: Request | None = None
        self._drawn_s: float | None = None  # when its last token came, once it is followed
        self._num_drawn = 0

    @property
    def latest(self) -> float:
        """Without what the steps' prompts took, which are known to whoever asks."""
        return self._taken_s / self._planned_s

    def follow(self, pilot: Request | None) -> None:
        self.pilot, self._drawn_s = pilot, None

    def draw(self, step_s: float, prompts_s: float, now_s: float) -> None:
        """The pilot has drawn tokens, in steps that should take `step_s` each, and the prompts of
        others in them `prompts_s` in all."""
        assert self.pilot is not None
        num_drawn = len(self.pilot.output_ids)
        num_steps = num_drawn - self._num_drawn
        if self._drawn_s is not None and num_steps:
            planned_s = num_steps * step_s
            taken_s = min(MOST * planned_s, now_s - self._drawn_s)
            left = math.exp(-num_steps / MEMORY_STEPS)
            self.mean = left * self.mean + (1.0 - left) * taken_s / planned_s
            left = math.exp(-taken_s / LATELY_S)
            self._taken_s = left * self._taken_s + taken_s
            self._planned_s = left * self._planned_s + planned_s + prompts_s
        self._drawn_s, self._num_drawn = now_s, num_drawn
