"""The backlog's lines, where requests leave before their turn and come back."""

import weakref

import pytest

from lorry.router.backlog import Backlog
from lorry.router.fairness import TokenCounters
from lorry.router.line import SPARE_TURNS
from lorry.router.order import ArrivalOrder, NewestOrder
from lorry.router.request import Request
from tests.support.router_requests import request


@pytest.fixture
def backlog() -> Backlog:
    fairness = TokenCounters(weight=lambda tenant: 1.0, by_adapter=True, quantum_tokens=1)
    return Backlog(ArrivalOrder(), NewestOrder(), fairness)


def add(backlog: Backlog, number: int, version: bytes = b"v") -> Request:
    added = request(version=version)
    added.number = number
    backlog.add(added)
    return added


def test_a_line_forgets_most_of_those_that_left_out_of_turn(backlog: Backlog) -> None:
    first = add(backlog, 0)
    for number in range(1, 500):
        backlog.remove(add(backlog, number))
    assert all(len(heap) <= 3 + SPARE_TURNS for heap in first.queue.heaps)
    assert backlog.first(0.0) is first
    backlog.remove(first)
    assert first.queue.heaps == ([], [])
    backlog.check_integrity()


def test_a_queue_that_was_empty_begins_anew(backlog: Backlog) -> None:
    left = add(backlog, 1)
    assert backlog.first(0.0) is left
    backlog.remove(left)
    assert backlog.first(0.0) is None
    backlog.add(left)  # as one whose worker was lost
    other = add(backlog, 2)
    assert left.queue is other.queue
    assert (backlog.first(0.0), backlog.first_with([left.queue.of_version])) == (left, left)
    backlog.check_integrity()


def test_one_set_of_queues_of_a_version_lives_while_a_request_of_it_does(backlog: Backlog) -> None:
    running = add(backlog, 1)
    queues = running.queue.of_version
    backlog.remove(running)  # it went to a worker
    assert (queues, backlog.first_with([queues])) == ({}, None)
    waiting = add(backlog, 2)
    assert waiting.queue is queues[waiting.tenant]
    assert backlog.first_with([queues]) is waiting
    backlog.remove(waiting)
    for backlog.overloaded in (False, True):
        assert backlog.first(0.0) is None  # and no line knows the queue any more
    gone = weakref.ref(queues)
    del running, waiting, queues
    assert gone() is None
    backlog.check_integrity()


def test_both_lines_skip_who_is_aside_and_look_ahead_takes_nobody(backlog: Backlog) -> None:
    one, two, three = (add(backlog, number) for number in (1, 2, 3))
    backlog.set_aside(one)
    backlog.set_aside(three)
    for backlog.overloaded in (False, True):
        assert backlog.first(0.0) is two
    backlog.put_back()
    assert backlog.ahead(0.0, 8) == [three, two, one]
    backlog.overloaded = False
    assert backlog.ahead(0.0, 8) == [one, two, three]
    backlog.pass_over(one, due_s=5.0)
    assert [backlog.first(4.0), backlog.first(5.0)] == [two, one]
    backlog.check_integrity()
