"""What transformers' warpers leave of logits, and the token that a seed then draws."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorry.kernels.gumbel_noise import gumbel_noise


def warped(logits_TV: torch.Tensor, sampling: Mapping[str, Any]) -> torch.Tensor:
    """Logits after temperature, top_k, top_p and min_p, as `sampling` has them."""
    prompt: Any = None  # which no warper looks at
    logits_TV = logits_TV / sampling["temperature"]
    if sampling.get("top_k"):
        logits_TV = TopKLogitsWarper(sampling["top_k"])(prompt, logits_TV)
    if sampling.get("top_p", 1.0) < 1:
        logits_TV = TopPLogitsWarper(sampling["top_p"])(prompt, logits_TV)
    if sampling.get("min_p"):
        logits_TV = MinPLogitsWarper(sampling["min_p"])(prompt, logits_TV)
    return logits_TV


def drawn(logits_TV: torch.Tensor, sampling: Mapping[str, Any], seed: int) -> list[int]:
    """Tokens at the output positions 0, 1, 2, ..."""
    if not sampling["temperature"]:
        return logits_TV.argmax(dim=1).tolist()
    position_T = torch.arange(len(logits_TV))
    noise_TV = gumbel_noise(torch.full_like(position_T, seed), position_T, logits_TV.shape[1])
    return (warped(logits_TV, sampling) + noise_TV).argmax(dim=1).tolist()
