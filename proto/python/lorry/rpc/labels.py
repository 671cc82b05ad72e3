"""The limits of labels, of adapters and of requests alike."""

from collections.abc import Mapping

from lorry.rpc.errors import InvalidRequest

MAX_LABELS = 16
MAX_LABEL_BYTES = 63


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidRequest for too many, an empty key, or a key or value that is too long."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequest.of("labels", f"must be at most {MAX_LABELS}, got {len(labels)}")
    for key, value in labels.items():
        if not key or max(len(key.encode()), len(value.encode())) > MAX_LABEL_BYTES:
            raise InvalidRequest.of(
                "labels",
                f"{key[:100]!r}: a key must have 1 to {MAX_LABEL_BYTES} bytes, a value at most "
                f"{MAX_LABEL_BYTES}",
            )
