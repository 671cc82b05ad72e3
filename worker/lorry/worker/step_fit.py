"""How the time of a step grows with its rows: a line through the steps of late."""

from dataclasses import dataclass

SMOOTHING = 0.05  # weight of the newest step
MOST_TIMES = 20.0  # that one more row may be cheaper than rows are on average; more is noise


@dataclass(slots=True)
class StepFit:
    """Moving moments of rows and seconds."""

    num_steps: int = 0
    mean_rows: float = 0.0
    mean_s: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0

    def note(self, rows: int, seconds: float) -> None:
        weight = max(SMOOTHING, 1 / (self.num_steps + 1))
        self.num_steps += 1
        more_rows, more_s = rows - self.mean_rows, seconds - self.mean_s
        self.mean_rows += weight * more_rows
        self.mean_s += weight * more_s
        self.variance = (1 - weight) * (self.variance + weight * more_rows**2)
        self.covariance = (1 - weight) * (self.covariance + weight * more_rows * more_s)

    def rows_per_s(self, rows: int, seconds: float) -> float:
        """By what one more row adds, next to a step of so many that took so long."""
        average = rows / seconds
        if self.covariance * MOST_TIMES * average <= self.variance:
            return average if not self.variance else MOST_TIMES * average
        return max(average, self.variance / self.covariance)
