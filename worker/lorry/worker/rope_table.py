"""Cosines and sines of every position, by the base model's kind of RoPE.

Computed step by step as transformers does it in float32, so that the tables are equal bit for bit:
at a position of a hundred thousand, another rounding of a frequency is another angle.
"""

import math

import torch

from lorry.kernels.rope import cos_sin_of, inverse_frequencies
from lorry.rpc.base_model import BaseModel
from lorry.rpc.rope_options import LinearScaling, Llama3Scaling, Rope, YarnScaling


def rope_table(base_model: BaseModel) -> torch.Tensor:
    """Of all positions in float32, ``[L, 2, D]``."""
    rope = base_model.options.rope
    table = cos_sin_of(
        base_model.max_context_tokens, frequencies(rope, base_model.geometry.head_dim)
    )
    if isinstance(rope.scaling, YarnScaling):
        table *= rope.scaling.attention_factor
    return table


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians that each pair of dimensions turns from one position to the next."""
    plain = inverse_frequencies(head_dim, rope.theta)
    match rope.scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(head_dim, rope.theta, scaling)
    return plain


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    original, factor = scaling.original_context_tokens, scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = 2 * math.pi / plain  # of a full turn, in positions
    scaled = torch.where(length > original / low, plain / factor, plain)
    share = (original / length - low) / (high - low)
    smoothed = (1 - share) * scaled / factor + share * scaled
    is_between = (length >= original / high) & (length <= original / low)
    return torch.where(is_between, smoothed, scaled)


def _yarn(head_dim: int, theta: float, scaling: YarnScaling) -> torch.Tensor:
    power = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    first, last = (
        _dimension_of(turns, head_dim, theta, scaling.original_context_tokens)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    divided = ((torch.arange(head_dim // 2).float() - first) / width).clamp(0, 1)
    kept = 1 - divided
    return 1 / (scaling.factor * power) * (1 - kept) + 1 / power * kept


def _dimension_of(turns: float, head_dim: int, theta: float, context_tokens: int) -> float:
    """The dimension, perhaps between two, that turns `turns` times over the context."""
    return head_dim * math.log(context_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))
