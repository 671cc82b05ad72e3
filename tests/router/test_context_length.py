import pytest

from lorry.router.context_length import check_answer_size
from lorry.rpc.errors import InvalidRequest
from lorry.v1 import common_pb2
from lorry.v1 import inference_service_pb2 as pb
from tests.support.router_requests import request

MESSAGE_BYTES = 2 << 20
FIRST_IDS = 100_000  # token ids of three bytes


def generation(top_logprobs: int | None, prompt_logprobs: int | None = None):
    return request(top_logprobs=top_logprobs, prompt_logprobs=prompt_logprobs).generation


@pytest.mark.parametrize("top_logprobs", [0, 1, 20])
def test_the_largest_answer_with_logprobs_fits_in_a_message(top_logprobs: int) -> None:
    with pytest.raises(InvalidRequest, match=r"response\.top_logprobs.*at most (\d+)") as refusal:
        check_answer_size(generation(top_logprobs), 1 << 30, 1000)
    most = int(str(refusal.value).split()[-1])
    check_answer_size(generation(top_logprobs), most, 1000)
    alternatives = most * top_logprobs
    answer = pb.GenerateResponse(
        text="four" * most,
        token_ids=[FIRST_IDS] * most,
        logprobs=common_pb2.Logprobs(
            logprobs=[-0.5] * most,
            top_counts=[top_logprobs] * most,
            top_token_ids=[FIRST_IDS] * alternatives,
            top_logprobs=[-0.5] * alternatives,
        ),
    )
    assert MESSAGE_BYTES // 2 < answer.ByteSize() < MESSAGE_BYTES


def test_an_answer_without_logprobs_has_no_such_limit() -> None:
    check_answer_size(generation(None), 1 << 30, 1 << 30)


def test_logprobs_of_the_prompt_take_their_part_of_the_message() -> None:
    with pytest.raises(InvalidRequest, match=r"response\.prompt_logprobs.*of 10281 prompt tokens"):
        check_answer_size(generation(None, 20), 1, 10_281)
    check_answer_size(generation(None, 20), 1, 10_280)
    check_answer_size(generation(0, 20), 2_000, 10_000)
    with pytest.raises(InvalidRequest, match=r"response\.top_logprobs"):
        check_answer_size(generation(0, 20), 3_000, 10_000)
