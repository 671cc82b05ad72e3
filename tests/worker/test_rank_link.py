"""Messages from the first tensor-parallel rank to another one, over a ring."""

import contextlib
import threading
from collections import deque

import pytest

from lorry.worker import rank_link
from lorry.worker.rank_link import PART_BYTES, RankGone, RingLink, receive
from lorry.worker.rank_messages import EndRank, FinishLoads, LoadAdapter, RankMessage
from lorry.worker.ring import Ring


def test_messages_come_in_order_and_may_be_larger_than_the_ring():
    messages: list[RankMessage] = [
        FinishLoads(1),
        LoadAdapter(b"v", 3, pages=list(range(2_000_000))),
        FinishLoads(2),
        LoadAdapter(b"w", 4, pages=[]),
        EndRank(),
    ]
    with contextlib.closing(Ring.create(3 * PART_BYTES)) as ring:
        link = RingLink(ring)
        sending = threading.Thread(target=lambda: deque(map(link.send, messages)))
        sending.start()
        received = receive(ring)
        assert [next(received) for _ in messages] == messages
        sending.join()


def test_a_rank_that_leaves_no_room_is_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_link, "SEND_TIMEOUT_S", 0.01)
    message = LoadAdapter(b"v", 3, pages=list(range(2_000_000)))
    with (
        contextlib.closing(Ring.create(2 * PART_BYTES)) as ring,
        pytest.raises(RankGone, match="does not read"),
    ):
        RingLink(ring).send(message)
