import itertools

import pytest

from lorry.worker.messages import Submit
from lorry.worker.request import TRANSITIONS, IllegalTransition, Request, RequestState


def request_in(state: RequestState) -> Request:
    submit = Submit(
        request=7,
        tenant="default",
        version=b"",
        token_ids=[5, 6, 7],
        generated_tokens=1,
        max_tokens=4,
        min_tokens=0,
        stop_token_ids=[],
        temperature=0.0,
        seed=0,
        remaining_s=2.5,
    )
    request = Request.of(submit, now_s=10.0)
    request.state = state
    return request


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(RequestState, RequestState)), ids=lambda s: s.name
)
def test_only_listed_transitions_are_legal(source: RequestState, target: RequestState) -> None:
    request = request_in(source)
    if target in TRANSITIONS[source]:
        request.move_to(target)
        assert request.state is target
    else:
        with pytest.raises(IllegalTransition, match=f"{source.name} -> {target.name}"):
            request.move_to(target)
        assert request.state is source


def test_generated_tokens_of_a_resumed_request_count_as_output() -> None:
    request = request_in(RequestState.WAITING)
    assert request.prompt_tokens == 2
    assert request.most_tokens == 6


def test_deadline_counts_from_arrival() -> None:
    assert request_in(RequestState.WAITING).deadline_s == 12.5
