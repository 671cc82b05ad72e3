"""The first tensor-parallel rank's way to another one, over a ring.

A message is sent in parts, so that it may be larger than the ring: what a step needs of the host
grows with the prompts that its samples' penalties count.
"""

from collections.abc import Iterator

from lorry.worker.rank_messages import RankCodec, RankMessage
from lorry.worker.ring import Ring, RingFull

SEND_TIMEOUT_S = 30.0  # a rank reads between steps; one that is stopped ends the worker before
WAIT_S = 1.0  # for messages, at a time
PART_BYTES = 1 << 20
MORE, LAST = b"\0", b"\1"  # what a part begins with


class RankGone(Exception):
    """Another rank takes no messages any more."""


class RingLink:
    """See `RankLink`."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._codec = RankCodec()

    def send(self, message: RankMessage) -> None:
        """Raises RankGone if the rank leaves no room."""
        data = memoryview(self._codec.encode(message))
        try:
            for start in range(0, len(data), PART_BYTES):
                end = start + PART_BYTES
                mark = MORE if end < len(data) else LAST
                self._ring.write(mark + data[start:end], SEND_TIMEOUT_S)
        except RingFull as error:
            raise RankGone(f"a tensor-parallel rank does not read: {error}") from error


def receive(ring: Ring) -> Iterator[RankMessage]:
    """What the first rank tells, without end."""
    codec, parts = RankCodec(), bytearray()
    while True:
        ring.wait(WAIT_S)
        for record in ring.read_all():
            parts += memoryview(record)[len(LAST) :]
            if record.startswith(LAST):
                message = codec.decode(bytes(parts))
                parts.clear()
                yield message
