from typing import Any

import pytest

from tests.support.router_requests import request, worker


def test_submits_are_numbered_up_to_the_limit() -> None:
    limited = worker(submit_limit=2)
    assert [limited.add(request()), limited.add(request())] == [1, 2]
    assert not limited.has_room
    with pytest.raises(AssertionError):
        limited.add(request())


def test_finished_requests_do_not_give_room_back() -> None:
    """The limit counts what was sent since Hello, in total."""
    limited = worker(submit_limit=1)
    asked = request()
    asked.seq = limited.add(asked)
    limited.remove(asked)
    assert not limited.active
    assert not limited.has_room
    limited.raise_submit_limit(2)
    assert limited.has_room


def test_the_submit_limit_is_only_raised() -> None:
    limited = worker(submit_limit=5)
    limited.raise_submit_limit(3)
    limited.raise_submit_limit(0)
    assert limited.submit_limit == 5


def test_a_draining_worker_takes_nothing() -> None:
    draining = worker(draining=True)
    assert not draining.has_room
    assert not draining.can_serve(request())


@pytest.mark.parametrize(
    ("fields", "able"),
    [
        ({"rank": 64}, True),
        ({"rank": 65}, False),
        ({"num_prompt_tokens": 500, "max_tokens": 12}, True),
        ({"num_prompt_tokens": 500, "max_tokens": 13}, False),
    ],
)
def test_rank_and_context_decide_what_it_can_serve(fields: dict[str, Any], able: bool) -> None:
    assert worker().can_serve(request(**fields)) is able


def test_residency_changes_add_up_and_a_snapshot_replaces_them() -> None:
    known = worker()
    known.update_residency(snapshot=True, gpu=([b"a", b"b"], []), host=([b"c"], []))
    known.update_residency(snapshot=False, gpu=([b"d"], [b"a"]), host=([], [b"c"]))
    assert (known.gpu, known.host) == ({b"b", b"d"}, set())
    known.update_residency(snapshot=True, gpu=([b"e"], []), host=([], []))
    assert (known.gpu, known.host) == ({b"e"}, set())
