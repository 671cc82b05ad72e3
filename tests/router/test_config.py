from pathlib import Path
from typing import Any

import pytest

from lorry.router.config import Config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_queued_requests": 0}, "max_queued_requests must be positive, got 0"),
        ({"client_stall_s": -1}, "client_stall_s must be positive, got -1"),
        ({"max_request_s": float("nan")}, "max_request_s must be positive, got nan"),
        ({"tokenizer_threads": 0}, "tokenizer_threads must be positive, got 0"),
        ({"worker_wait_s": -0.5}, "worker_wait_s must not be negative, got -0.5"),
        ({"worker": ()}, "worker must name at least one"),
        ({"worker": ("h:1", "h:1")}, "worker must name each"),
        ({"slo_ttft_s": 0}, "slo_ttft_s must be positive, got 0"),
        ({"cluster_wait_s": -1}, "cluster_wait_s must not be negative, got -1"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(model=Path("/models/llama"), **fields)


def test_the_served_name_is_the_directorys_unless_given() -> None:
    assert Config(model=Path("/models/llama/")).served_model == "llama"
    assert Config(model=Path("/models/llama"), model_name="chat").served_model == "chat"
