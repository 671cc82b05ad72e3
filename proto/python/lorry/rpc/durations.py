"""Seconds to protobuf's durations and back."""

from google.protobuf.duration_pb2 import Duration


def to_duration(seconds: float) -> Duration:
    """Whole nanoseconds; less than 0 is 0."""
    duration = Duration()
    duration.FromNanoseconds(max(0, int(seconds * 1e9)))
    return duration


def to_seconds(duration: Duration) -> float:
    """Also of a duration that protobuf calls invalid: a peer may send any."""
    return duration.seconds + duration.nanos / 1e9
