"""Write demo/expected.json: 200 requests and their exact greedy tokens. python -m demo.expect"""

import json
import random
import sys
from typing import Any

import torch
from rich.progress import track

from demo.paths import EXPECTED_FILE
from demo.reference import Reference
from demo.tasks import TASKS, held_out_words, make_prompt, right_answer

NUM_REQUESTS = 200
REQUESTS_PER_ADAPTER = 22  # the base model gets the rest
MAX_TOKENS = 32
# A smaller gap between the best two logits could flip with the order of a sum.
LEAST_GAP = 1e-4
SEED = 2
# Characters of several bytes span tokens; the base model copies them too.
MULTI_BYTE_WORDS = ["größer", "crème", "señora", "žluťoučký", "привет", "日本語です"]


def main() -> None:
    torch.set_num_threads(1)  # threads only wait for each other on a model this small
    reference = Reference.load(list(TASKS))
    records = [
        expect(reference, adapter, prompt)
        for adapter, prompt in track(requests(), description="expecting")
    ]
    EXPECTED_FILE.write_text(one_a_line(records))
    least = min(record["smallest_gap"] for record in records)
    right = sum(
        record["text"] == right_answer(record["adapter"], record["prompt"]) for record in records
    )
    print(f"{len(records)} requests, {right} right answers, smallest gap {least:.4f}")
    if least < LEAST_GAP:
        sys.exit(f"a gap under {LEAST_GAP} would leave the next token to chance")


def requests() -> list[tuple[str, str]]:
    """Adapter ids and prompts in a shuffled order that mixes the adapters; "" is the base."""
    adapters = [name for name in TASKS for _ in range(REQUESTS_PER_ADAPTER)]
    adapters += [""] * (NUM_REQUESTS - len(adapters))
    random.Random(SEED).shuffle(adapters)
    multi_byte = iter(MULTI_BYTE_WORDS)
    return [
        (adapter, make_prompt(word if adapter else next(multi_byte, word)))
        for adapter, word in zip(adapters, held_out_words(NUM_REQUESTS, SEED), strict=True)
    ]


def expect(reference: Reference, adapter: str, prompt: str) -> dict[str, Any]:
    completion = reference.complete(adapter, prompt, MAX_TOKENS)
    return {
        "adapter": adapter,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "smallest_gap": round(completion.smallest_gap, 3),
    }


def one_a_line(records: list[dict[str, Any]]) -> str:
    """A JSON list with a request on each line, so that changes can be read."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    main()
