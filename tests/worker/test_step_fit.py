import random

import pytest

from lorry.worker.step_fit import MOST_TIMES, StepFit


def test_one_more_row_costs_what_the_line_says() -> None:
    fit, draw = StepFit(), random.Random(1)
    for _ in range(200):
        rows = draw.choice([8, 8, 8, 200, 512])
        fit.note(rows, (0.01 + 0.0001 * rows) * draw.uniform(0.98, 1.02))
    assert fit.rows_per_s(200, 0.03) == pytest.approx(10_000, rel=0.1)


def test_equal_steps_tell_no_more_than_their_average() -> None:
    fit = StepFit()
    for _ in range(10):
        fit.note(100, 0.02)
    assert fit.rows_per_s(100, 0.02) == pytest.approx(5000)


def test_steps_that_do_not_grow_are_not_believed_to_be_free() -> None:
    fit = StepFit()
    for rows in [10, 200] * 10:
        fit.note(rows, 0.02)
    assert fit.rows_per_s(200, 0.02) == pytest.approx(MOST_TIMES * 200 / 0.02)
