"""The engine on the GPU answers the demo's requests."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.worker.config import DtypeName
from tests.support.engines import EngineHarness

DEMO = Path(__file__).parents[2] / "demo"
REQUESTS: list[dict[str, Any]] = json.loads((DEMO / "expected.json").read_text())


def answers(dtype: DtypeName, directory: Path, pool_pages: int) -> list[list[int]]:
    """Token ids of all requests, sent at once."""
    harness = EngineHarness(
        DEMO / "model", directory, device="cuda", dtype=dtype, pool_pages=pool_pages
    )
    numbers = [
        harness.submit(
            prompt_ids(request["prompt"]),
            DEMO / "adapters" / request["adapter"] if request["adapter"] else None,
            request["max_tokens"],
        )
        for request in REQUESTS
    ]
    harness.run()
    assert harness.engine.status().max_adapters_beside_base_in_step == 8
    return [harness.tokens[number] for number in numbers]


def prompt_ids(prompt: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json")).encode(prompt).ids
    return ids


def test_fp32_tokens_equal_those_of_transformers_and_peft(tmp_path: Path) -> None:
    assert answers("fp32", tmp_path, 4000) == [r["token_ids"] for r in REQUESTS]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_adapters_accuracy(dtype: DtypeName, tmp_path: Path) -> None:
    got = answers(dtype, tmp_path, 8000)
    right = sum(
        tokens == request["token_ids"] for tokens, request in zip(got, REQUESTS, strict=True)
    )
    assert right >= 0.97 * len(REQUESTS)
