"""Top-k, top-p and min-p over a vocabulary that is split over ranks.

Both top-k and top-p ask for the largest value that enough logits reach: a number of them, or a
share of the probability. The ranks find it bit by bit, telling each other sums over their ids.

Shape suffixes: N = rows that sample, C = rows that cut something off, V = this rank's ids.
"""

import torch

from lorry.worker.collectives import Collectives
from lorry.worker.step_input import SamplingInput

BITS = 32  # of a float32
SIGN = 1 << 31


def shared_threshold(
    logits_NV: torch.Tensor, sampling: SamplingInput, collectives: Collectives
) -> torch.Tensor:
    """The least logit that each row may draw, as `truncation_reference`; the same on every rank.

    `logits_NV` is float32.
    """
    temperature_N = sampling.temperature_N
    threshold_N = torch.full_like(temperature_N, -torch.inf)
    is_cut_N = (sampling.top_k_N > 0) | (sampling.top_p_N < 1) | (sampling.min_p_N > 0)
    row = (is_cut_N & (temperature_N > 0)).nonzero()[:, 0]
    if not row.numel():
        return threshold_N
    logits_CV, temperature_C = logits_NV[row], temperature_N[row]
    top_k_C, top_p_C, min_p_C = (
        values[row] for values in (sampling.top_k_N, sampling.top_p_N, sampling.min_p_N)
    )
    most_C = collectives.all_gather(logits_CV.amax(dim=1)).amax(dim=0)
    weight_CV = ((logits_CV - most_C[:, None]).double() / temperature_C[:, None]).exp()
    ones_CV = torch.ones_like(weight_CV)
    kth_C = _reached(logits_CV, ones_CV, top_k_C.double(), collectives)
    kth_C = kth_C.where(top_k_C > 0, -torch.inf)
    mass_C = _sum(weight_CV * (logits_CV >= kth_C[:, None]), collectives)
    nucleus_C = _reached(logits_CV, weight_CV, top_p_C * mass_C, collectives)
    nucleus_C = nucleus_C.where(top_p_C < 1, -torch.inf)
    floor_C = most_C + temperature_C * min_p_C.log().clamp(max=0)
    threshold_N[row] = torch.maximum(torch.maximum(kth_C, nucleus_C), floor_C)
    return threshold_N


def _reached(
    logits_CV: torch.Tensor,
    weight_CV: torch.Tensor,
    target_C: torch.Tensor,
    collectives: Collectives,
) -> torch.Tensor:
    """The largest value such that the logits that reach it weigh `target_C`; -inf if none."""
    key_CV = _ordered(logits_CV)
    key_C = torch.zeros_like(target_C, dtype=torch.int64)
    for bit in reversed(range(BITS)):
        higher_C = key_C | 1 << bit
        weight_C = _sum(weight_CV * (key_CV >= higher_C[:, None]), collectives)
        key_C = higher_C.where(weight_C >= target_C, key_C)
    return _unordered(key_C).where(key_C > 0, -torch.inf)


def _sum(values_CV: torch.Tensor, collectives: Collectives) -> torch.Tensor:
    """Over the ids of all ranks; added in one order, so that no rank goes another way."""
    return collectives.all_gather(values_CV.sum(dim=1)).sum(dim=0)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Unsigned 32-bit keys (in int64) in the order of the float32 values."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= SIGN, bits ^ 0xFFFFFFFF, bits | SIGN)


def _unordered(keys: torch.Tensor) -> torch.Tensor:
    bits = torch.where(keys >= SIGN, keys ^ SIGN, keys ^ 0xFFFFFFFF)
    signed = torch.where(bits >= SIGN, bits - (1 << BITS), bits)
    return signed.int().view(torch.float32)
