import pytest

from demo.answers import Answer, DemoFailed, Expected, compare, read_expected
from demo.run import check_one_step_held_all
from demo.scoreboard import Pushed, Scoreboard
from demo.tasks import TASKS
from lorry.v1.worker_service_pb2 import WorkerStatus

EXPECTED = [
    Expected("reverse", "abc>", 8, Answer([3, 2, 1], "cba")),
    Expected("", "abc>", 8, Answer([1, 2, 3], "abc")),
]


def test_the_requests_cover_every_adapter_and_the_base() -> None:
    expected = read_expected()
    assert len(expected) == 200
    assert {each.adapter for each in expected} == {*TASKS, ""}
    assert all(each.request.temperature == 0 for each in expected)


def test_equal_answers_pass() -> None:
    compare(EXPECTED, [each.answer for each in EXPECTED])


@pytest.mark.parametrize(
    "answer", [Answer([3, 2], "cba"), Answer([3, 2, 1], "cb"), Answer([3, 2, 0], "cba")]
)
def test_any_difference_fails_and_is_named(answer: Answer) -> None:
    with pytest.raises(DemoFailed, match=r"1 of 2 answers differ:\nreverse 'abc>'"):
        compare(EXPECTED, [answer, EXPECTED[1].answer])


def test_a_missing_answer_fails() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare(EXPECTED, [EXPECTED[0].answer])


def test_one_step_must_have_held_all_adapters_and_the_base() -> None:
    check_one_step_held_all(WorkerStatus(max_adapters_beside_base_in_step=8))
    apart = WorkerStatus(max_adapters_in_step=8, max_adapters_beside_base_in_step=7)
    with pytest.raises(DemoFailed, match="no step held the base and 8 adapters; the most was 7"):
        check_one_step_held_all(apart)


def test_the_scoreboard_counts_each_adapter_and_the_base_apart() -> None:
    scoreboard = Scoreboard({"reverse": Pushed(12, 0.1)}, ["reverse", "reverse", ""])
    scoreboard.count_first_token("reverse")
    scoreboard.count_tokens("reverse", 3)
    scoreboard.count_answer("reverse", right=True)
    scoreboard.count_answer("reverse", right=False)
    score, base = scoreboard.scores["reverse"], scoreboard.scores[""]
    assert (score.num_requests, score.num_answered, score.num_tokens) == (2, 2, 3)
    assert score.exact == 0.5
    assert (base.num_requests, base.num_answered, base.exact) == (1, 0, 0.0)
    assert scoreboard.tokens_per_s > 0
    assert scoreboard.table().row_count == 2
