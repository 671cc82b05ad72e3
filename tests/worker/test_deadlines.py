from lorry.worker import messages as m
from lorry.worker.deadlines import SPARE_DEADLINES
from tests.support.schedules import Driver


def test_requests_that_have_ended_are_not_held_until_their_deadlines() -> None:
    driver = Driver()
    driver.send(0, 2, 4, remaining_s=1.0)
    for number in range(1, 1000):
        driver.send(number, 2, 4, remaining_s=3600.0)
        driver.note(*driver.scheduler.cancel([number]))
        # Private: nothing else shows what is held.
        assert (
            len(driver.scheduler._deadlines) <= 2 * len(driver.scheduler.requests) + SPARE_DEADLINES
        )
    driver.now_s = 2.0
    driver.step()
    failure = driver.finished[0].failure
    assert failure is not None
    assert failure.reason == "DEADLINE_EXPIRED"
    assert {end.reason for end in driver.finished.values()} == {
        m.FinishReason.ABORTED,
        m.FinishReason.CANCELLED,
    }
