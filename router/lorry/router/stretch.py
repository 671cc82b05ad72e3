"""How fast a worker's tokens follow each other, beside how long it says that its steps take."""

MEMORY_STEPS = 64.0  # what lies longer back counts less than a third


class Stretch:
    """By how much the tokens of running requests take longer than steps of decodes alone.

    Prompts share the steps, and what a worker measured of steps with many rows may be old.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._num_noted = 0

    def note(self, gap_s: float, step_s: float, *, steps: int, rows: int) -> None:
        """One of `rows` requests has had a token every `gap_s` over so many steps; others tell of
        the same steps."""
        self._num_noted += 1
        weight = max(1.0 / self._num_noted, steps / (MEMORY_STEPS * rows))
        self.factor += min(1.0, weight) * (gap_s / step_s - self.factor)
