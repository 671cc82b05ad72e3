"""What penalties, biases and bans leave of logits, one token after the other, by other means."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tests.support.warped_draws import drawn

DEVICE: Any = "cpu"  # of what transformers' processors make themselves


def adjusted(
    logits_TV: torch.Tensor, fields: Mapping[str, Any], prompt: Sequence[int], output: Sequence[int]
) -> torch.Tensor:
    """`logits_TV` are those of the tokens of `output`; `fields` are those of an engine's Submit."""
    rows = [
        _adjusted_row(logits[None].float(), fields, list(prompt), list(output[:position]))
        for position, logits in enumerate(logits_TV)
    ]
    return torch.cat(rows)


def drawn_adjusted(
    logits_TV: torch.Tensor,
    fields: Mapping[str, Any],
    prompt: Sequence[int],
    output: Sequence[int],
    seed: int,
) -> list[int]:
    """Tokens at the output positions 0, 1, 2, ..., each after those of `output` before it."""
    sampling = {"temperature": 0.0} | dict(fields)
    return drawn(adjusted(logits_TV, fields, prompt, output), sampling, seed)


def _adjusted_row(
    logits: torch.Tensor, fields: Mapping[str, Any], prompt: list[int], output: list[int]
) -> torch.Tensor:
    ids: Any = torch.tensor([prompt + output])
    if "repetition_penalty" in fields:
        logits = RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"])(ids, logits)
    logits = logits.clone()
    for token_id, count in Counter(output).items():  # OpenAI's formula
        logits[0, token_id] -= count * fields.get("frequency_penalty", 0.0)
        logits[0, token_id] -= fields.get("presence_penalty", 0.0)
    if biases := fields.get("logit_bias"):
        sequence_bias: Any = [[[token_id], bias] for token_id, bias in biases.items()]
        logits = SequenceBiasLogitsProcessor(sequence_bias)(ids, logits)
    if stop := fields.get("stop_token_ids"):
        least = fields.get("min_tokens", 0)
        ban = MinNewTokensLengthLogitsProcessor(len(prompt), least, stop, device=DEVICE)
        logits = ban(ids, logits)
    return logits
