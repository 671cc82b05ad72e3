"""The first tensor-parallel rank's way to another one, over a ring."""

from lorry.worker.rank_messages import RankCodec, RankMessage
from lorry.worker.ring import Ring, RingFull

SEND_TIMEOUT_S = 30.0  # a rank reads between steps; one that is stopped ends the worker before


class RankGone(Exception):
    """Another rank takes no messages any more."""


class RingLink:
    """See `RankLink`."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._codec = RankCodec()

    def send(self, message: RankMessage) -> None:
        """Raises RankGone if the rank leaves no room."""
        try:
            self._ring.write(self._codec.encode(message), SEND_TIMEOUT_S)
        except RingFull as error:
            raise RankGone(f"a tensor-parallel rank does not read: {error}") from error
