"""Which tokens a row may draw: a threshold of its logits for top-k, then top-p, then min-p.

Kept are the tokens whose logits reach the threshold, so of equal logits all are kept or none:

- top-k keeps the tokens above which fewer than k lie;
- top-p keeps, of those, the tokens above which less than the share p of their probability lies;
- min-p keeps the tokens of at least the share min_p of the largest probability.

Shape suffixes: T = rows that sample, V = vocabulary or lanes of a program, C = candidates.
"""

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.threshold_search import (
    UNUSED_BITS,
    find_threshold,
    kth_largest,
    load_logits,
    sum_weights,
)

BLOCK_V = 8192  # logits that a program reads at a time, and its largest number of candidates
NUM_WARPS = 16


def truncation_reference(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    top_k_T: torch.Tensor,
    top_p_T: torch.Tensor,
    min_p_T: torch.Tensor,
) -> torch.Tensor:
    """The least logit that each row may draw (float32), -inf where nothing is cut off.

    A top_k of 0, a top_p of 1 and a min_p of 0 are off, as all are of rows of temperature 0. NaNs
    are not drawn, and what is infinite is as likely as what else is.
    """
    threshold_T = torch.full_like(temperature_T, -torch.inf)
    is_cut_T = (temperature_T > 0) & ((top_k_T > 0) | (top_p_T < 1) | (min_p_T > 0))
    row = is_cut_T.nonzero()[:, 0]
    if row.numel():
        columns = (values[row, None] for values in (temperature_T, top_k_T, top_p_T, min_p_T))
        logits = logits_TV[row].float()
        threshold_T[row] = _thresholds(logits.masked_fill(logits.isnan(), -torch.inf), *columns)
    return threshold_T


def _thresholds(
    logits_TV: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    logits_TV = logits_TV.sort(dim=-1, descending=True).values
    most, vocabulary = logits_TV[:, :1], logits_TV.shape[1]
    place = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary).long() - 1
    kth = logits_TV.gather(1, place)
    below_TV = (logits_TV - most).where(logits_TV < most, 0).double()  # infinite ones differ by NaN
    weight_TV = (below_TV / temperature).exp().where(logits_TV >= kth, 0)
    above_TV = weight_TV.cumsum(dim=-1) - weight_TV
    num_kept = (above_TV < top_p * weight_TV.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    nucleus = logits_TV.gather(1, num_kept - 1)
    floor = (most + temperature * min_p.log().clamp(max=0)).where(min_p > 0, -torch.inf)
    threshold = torch.maximum(
        kth.where(top_k > 0, -torch.inf), nucleus.where(top_p < 1, -torch.inf)
    )
    return torch.maximum(threshold, floor)[:, 0]


@triton.jit
def _truncation_kernel(
    logits_ptr,  # [T, V]
    temperature_ptr,  # [T]
    top_k_ptr,  # [T]
    top_p_ptr,  # [T]
    min_p_ptr,  # [T]
    threshold_ptr,  # [T], float32
    candidate_ptr,  # [T, BLOCK_V]
    stride_lt,
    vocabulary,
    UNUSED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row's threshold: a bound, the logits that reach it, and the search among them.

    If they are too many, the search reads the whole row in each pass.
    """
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    threshold = tl.full((), -float("inf"), tl.float32)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        logits_ptr += row * stride_lt
        candidate_ptr += row * BLOCK_V
        maxima_V = tl.full((BLOCK_V,), -float("inf"), tl.float32)
        for start in range(0, vocabulary, BLOCK_V):
            maxima_V = tl.maximum(maxima_V, load_logits(logits_ptr, start, vocabulary, BLOCK_V))
        most = tl.max(maxima_V, 0)
        if (top_k > 0) | (top_p < 1):
            low = tl.full((), -float("inf"), tl.float32)
            mass = tl.full((), 0.0, tl.float32)
            if top_k == 0:
                mass = sum_weights(logits_ptr, vocabulary, low, most, temperature, BLOCK_V)
                # All logits below, together, have half of the probability that top-p cuts off.
                low = most + temperature * tl.log(0.5 * (1 - top_p) * mass / vocabulary)
            elif top_k <= BLOCK_V:
                low = kth_largest(maxima_V, most, top_k, UNUSED)  # of parts of the row
            num_candidates = _gather(logits_ptr, candidate_ptr, vocabulary, low, BLOCK_V)
            tl.debug_barrier()  # what other threads of the program wrote is read below
            if num_candidates <= BLOCK_V:
                threshold = _search(
                    candidate_ptr,
                    num_candidates,
                    low,
                    most,
                    mass,
                    temperature,
                    top_k,
                    top_p,
                    UNUSED,
                    BLOCK_V,
                )
            else:
                threshold = _search(
                    logits_ptr,
                    vocabulary,
                    low,
                    most,
                    mass,
                    temperature,
                    top_k,
                    top_p,
                    UNUSED,
                    BLOCK_V,
                )
        if min_p > 0:
            floor = most + temperature * tl.minimum(tl.log(min_p), 0.0)
            threshold = tl.maximum(threshold, floor)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _gather(logits_ptr, candidate_ptr, vocabulary, low, BLOCK_V: tl.constexpr):
    """Write the logits that reach `low`, as far as there is room; returns how many there are."""
    count = 0
    for start in range(0, vocabulary, BLOCK_V):
        place_V = start + tl.arange(0, BLOCK_V)
        in_row = place_V < vocabulary
        logits_V = tl.load(logits_ptr + place_V, mask=in_row, other=-float("inf"))
        reaches = in_row & (logits_V.to(tl.float32) >= low)
        place_C = count + tl.cumsum(reaches.to(tl.int32), 0) - 1
        tl.store(candidate_ptr + place_C, logits_V, mask=reaches & (place_C < BLOCK_V))
        count += tl.sum(reaches.to(tl.int32), 0)
    return count


@triton.jit
def _search(
    logits_ptr,
    length,
    low,
    most,
    mass,  # of all tokens, for rows without top-k
    temperature,
    top_k,
    top_p,
    UNUSED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The threshold of top-k and top-p, which is not below `low`."""
    threshold = low
    if top_k > 0:
        threshold = find_threshold(
            logits_ptr, length, low, most, top_k, temperature, False, UNUSED, BLOCK_V
        )
    if top_p < 1:
        if top_k > 0:
            mass = sum_weights(logits_ptr, length, threshold, most, temperature, BLOCK_V)
        target = top_p * mass
        threshold = find_threshold(
            logits_ptr, length, threshold, most, target, temperature, True, UNUSED, BLOCK_V
        )
    return threshold


def truncate(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    top_k_T: torch.Tensor,
    top_p_T: torch.Tensor,
    min_p_T: torch.Tensor,
) -> torch.Tensor:
    """The least logit that each row may draw (float32), as `truncation_reference`.

    Where a probability lies on the border of top-p, rounding decides, each time the same way.
    """
    num_rows, vocabulary = logits_TV.shape
    threshold_T = torch.empty(num_rows, dtype=torch.float32, device=logits_TV.device)
    candidate_TC = torch.empty(num_rows, BLOCK_V, dtype=logits_TV.dtype, device=logits_TV.device)
    _truncation_kernel[(num_rows,)](
        logits_TV,
        temperature_T,
        top_k_T,
        top_p_T,
        min_p_T,
        threshold_T,
        candidate_TC,
        logits_TV.stride(0),
        vocabulary,
        UNUSED=UNUSED_BITS[logits_TV.dtype],
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # a row is rounded alike in any dtype
        launch_pdl=has_dependent_launch(logits_TV.device),
    )
    return threshold_T
