"""Seconds as protobuf durations."""

import pytest
from google.protobuf.duration_pb2 import Duration

from lorry.rpc.durations import to_duration, to_seconds


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.25, 86_400.5])
def test_seconds_come_back(seconds: float) -> None:
    assert to_seconds(to_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


def test_a_duration_that_is_none_is_read_all_the_same() -> None:
    assert to_seconds(Duration(seconds=1, nanos=-2_000_000_000)) == -1


def test_time_that_is_over_is_no_time() -> None:
    assert to_seconds(to_duration(-0.5)) == 0
