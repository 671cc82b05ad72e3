import grpc
import pytest

from lorry.client.retry import RetryPolicy
from lorry.rpc.errors import LorryError, NoWorker, QueueFull, RemoteError, WorkerLost

POLICY = RetryPolicy(attempts=4, first_delay_s=0.1, max_delay_s=0.3)


@pytest.mark.parametrize("error", [QueueFull("full", retry_after_s=1), WorkerLost("lost")])
def test_what_a_server_answered_is_not_tried_again(error: LorryError) -> None:
    assert POLICY.delay_s(0, error, 0.0) is None


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_what_a_server_left_when_it_stopped_is_tried_again(code: grpc.StatusCode) -> None:
    assert POLICY.delay_s(0, RemoteError("", status_code=code, status_reason=""), 0.0) is not None


def test_the_delay_doubles_up_to_its_limit() -> None:
    delays = [POLICY.delay_s(attempt, NoWorker("none"), 0.0) for attempt in range(3)]
    assert delays == pytest.approx([0.05, 0.1, 0.15])


def test_the_last_attempt_is_followed_by_none() -> None:
    assert POLICY.delay_s(2, NoWorker("none"), 0.0) is not None
    assert POLICY.delay_s(3, NoWorker("none"), 0.0) is None


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_jitter_never_shortens_what_the_server_asked_for(jitter: float) -> None:
    delay_s = POLICY.delay_s(0, NoWorker("none", retry_after_s=2.0), jitter)
    assert delay_s is not None
    assert 2.0 <= delay_s < 2.1


def test_jitter_spreads_the_delay() -> None:
    low, high = (POLICY.delay_s(1, NoWorker("none"), jitter) for jitter in (0.0, 0.999))
    assert low is not None
    assert high is not None
    assert high > 2 * low


def test_no_attempts_are_refused() -> None:
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        RetryPolicy(attempts=0)
