"""Seconds as protobuf durations."""

import pytest

from lorry.rpc.durations import to_duration, to_seconds


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.25, 86_400.5])
def test_seconds_come_back(seconds: float) -> None:
    assert to_seconds(to_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


def test_time_that_is_over_is_no_time() -> None:
    assert to_seconds(to_duration(-0.5)) == 0
