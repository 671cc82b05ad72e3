"""Seconds to protobuf's durations and back."""

from google.protobuf.duration_pb2 import Duration


def to_duration(seconds: float) -> Duration:
    """Whole nanoseconds; less than 0 is 0."""
    duration = Duration()
    duration.FromNanoseconds(max(0, int(seconds * 1e9)))
    return duration


def to_seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
