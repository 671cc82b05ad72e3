import itertools

import pytest

from lorry.router.request import FINAL, TRANSITIONS, IllegalTransition, RequestState
from tests.support.router_requests import request


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(RequestState)


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(RequestState, RequestState)), ids=lambda s: s.name
)
def test_only_listed_transitions_are_legal(source: RequestState, target: RequestState) -> None:
    moved = request("r1")
    moved.state = source
    if target in TRANSITIONS[source]:
        moved.move_to(target)
        assert moved.state is target
        assert moved.ended is (target in FINAL)
    else:
        with pytest.raises(IllegalTransition, match=f"r1: {source.name} -> {target.name}"):
            moved.move_to(target)
        assert moved.state is source


def test_an_output_is_complete_at_max_tokens_or_a_stop_token() -> None:
    asked = request("r1", max_tokens=3, stop_token_ids=frozenset({9}))
    assert not asked.output_complete
    asked.output_ids += [1, 2]
    assert not asked.output_complete
    asked.output_ids.append(3)
    assert asked.output_complete
    assert not asked.ended_by_token
    asked.output_ids[:] = [9]
    assert asked.output_complete
    assert asked.ended_by_token
