"""Draw tokens from logits: greedy, or with temperature by the Gumbel-max trick.

The noise is that of `lorry.kernels.gumbel_noise`, so a draw does not depend on row, step or batch.

Shape suffixes: T = rows that sample, V = vocabulary.
"""

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.gumbel_noise import (
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    gumbel_noise,
)

BLOCK_V = 2048  # of a program: chunks of a row run side by side


def sample_reference(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    seed_T: torch.Tensor,
    output_position_T: torch.Tensor,
    threshold_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a token id for each row (int64); temperature 0 takes the most likely one.

    `seed_T` holds the bits of an unsigned 64-bit seed in int64. Tokens whose logits are below the
    row's threshold are not drawn, nor are NaNs. Ties go to the smallest id.
    """
    return best_reference(logits_TV, temperature_T, seed_T, output_position_T, threshold_T)[1]


def best_reference(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    seed_T: torch.Tensor,
    output_position_T: torch.Tensor,
    threshold_T: torch.Tensor | None = None,
    *,
    first_id: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sample_reference` maximizes (float32), and the id where it is largest (int64).

    The logits may be those of a part of the vocabulary that begins with `first_id`.
    """
    score_TV = logits_TV.float().masked_fill(logits_TV.isnan(), -torch.inf)
    drawn = (temperature_T > 0).nonzero()[:, 0]
    if drawn.numel():
        noise = gumbel_noise(
            seed_T[drawn], output_position_T[drawn], logits_TV.shape[1], first_id=first_id
        )
        logits = score_TV[drawn]
        score = logits / temperature_T[drawn, None] + noise
        if threshold_T is not None:
            score = score.where(logits >= threshold_T[drawn, None], -torch.inf)
        score_TV[drawn] = score
    token_T = score_TV.argmax(dim=-1)
    return score_TV.gather(1, token_T[:, None])[:, 0], token_T + first_id


@triton.jit
def _scores_kernel(
    logits_ptr,  # [T, V]
    temperature_ptr,  # [T]
    seed_ptr,  # [T]
    output_position_ptr,  # [T]
    threshold_ptr,  # [T], or unused
    best_score_ptr,  # [T, chunks], float32
    best_token_ptr,  # [T, chunks], int32
    stride_lt,
    vocabulary,
    first_id,
    ROUNDS: tl.constexpr,
    MULTIPLIER_0: tl.constexpr,
    MULTIPLIER_1: tl.constexpr,
    WEYL_0: tl.constexpr,
    WEYL_1: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Best score and its token in each chunk of a row's vocabulary."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = token < vocabulary
    score = tl.load(logits_ptr + row * stride_lt + token, mask=in_row, other=-float("inf"))
    score = score.to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        seed = tl.load(seed_ptr + row)
        key_0 = seed.to(tl.uint32)
        key_1 = (seed >> 32).to(tl.uint32)
        c0 = (token + first_id).to(tl.uint32)
        c1 = tl.load(output_position_ptr + row).to(tl.uint32) + tl.zeros_like(c0)
        c2 = tl.zeros_like(c0)
        c3 = tl.zeros_like(c0)
        for _ in tl.static_range(ROUNDS):
            high_0 = tl.umulhi(c0, tl.full((), MULTIPLIER_0, tl.uint32))
            high_1 = tl.umulhi(c2, tl.full((), MULTIPLIER_1, tl.uint32))
            low_0 = c0 * tl.full((), MULTIPLIER_0, tl.uint32)
            low_1 = c2 * tl.full((), MULTIPLIER_1, tl.uint32)
            c0 = high_1 ^ c1 ^ key_0
            c1 = low_1
            c2 = high_0 ^ c3 ^ key_1
            c3 = low_0
            key_0 += tl.full((), WEYL_0, tl.uint32)
            key_1 += tl.full((), WEYL_1, tl.uint32)
        uniform = ((c0 >> 9).to(tl.float32) + 0.5) * (2.0**-23)
        is_kept = in_row
        if HAS_THRESHOLD:
            is_kept = in_row & (score >= tl.load(threshold_ptr + row))
        score = score / temperature - tl.log(-tl.log(uniform))
        score = tl.where(is_kept, score, -float("inf"))
    score = tl.where(score == score, score, -float("inf"))  # of a NaN the place would be arbitrary
    best, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + chunk
    tl.store(best_score_ptr + at, best)
    tl.store(best_token_ptr + at, first_id + chunk * BLOCK_V + place)


@triton.jit
def _best_kernel(
    best_score_ptr,  # [T, chunks]
    best_token_ptr,  # [T, chunks]
    token_ptr,  # [T], or unused
    candidate_ptr,  # [T, score or token], or unused
    chunks,
    IS_PART: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The token of the best chunk of each row; of a part of the vocabulary with its score."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_C)
    at = best_score_ptr + row * chunks + chunk
    score = tl.load(at, mask=chunk < chunks, other=-float("inf"))
    place = tl.argmax(score, 0, tie_break_left=True)
    token = tl.load(best_token_ptr + row * chunks + place)
    if IS_PART:
        tl.store(candidate_ptr + 2 * row, tl.max(score, 0).to(tl.float64))
        tl.store(candidate_ptr + 2 * row + 1, token.to(tl.float64))
    else:
        tl.store(token_ptr + row, token.to(tl.int64))


@triton.jit
def _draw_best_kernel(
    candidate_ptr,  # [parts, T, score or token]
    token_ptr,  # [T]
    parts,
    BLOCK_P: tl.constexpr,
):
    """The token of the best candidate of each row; of equal ones that of the first part."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    at = candidate_ptr + 2 * (part * tl.num_programs(0) + row)
    score = tl.load(at, mask=part < parts, other=-float("inf"))
    place = tl.argmax(score, 0, tie_break_left=True)
    token = tl.load(candidate_ptr + 2 * (place * tl.num_programs(0) + row) + 1)
    tl.store(token_ptr + row, token.to(tl.int64))


def sample(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    seed_T: torch.Tensor,
    output_position_T: torch.Tensor,
    token_T: torch.Tensor,
    threshold_T: torch.Tensor | None = None,
) -> None:
    """Write ``argmax(logits / temperature + noise)`` of each row into `token_T` (int64).

    Temperature 0 takes the most likely token; else tokens whose logits are below the row's
    threshold are left out, as are NaNs. Ties go to the smallest id. The noise is that of
    `gumbel_noise`, whose 32 random bits are equal and whose logarithms may differ in the last ones.
    """
    _draw(logits_TV, temperature_T, seed_T, output_position_T, token_T, None, threshold_T)


def best(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    seed_T: torch.Tensor,
    output_position_T: torch.Tensor,
    *,
    first_id: int,
) -> torch.Tensor:
    """What `sample` maximizes and the id where it is largest, ``[T, 2]``, exact in float64.

    The logits are those of a part of the vocabulary that begins with `first_id`.
    """
    candidate_T2 = torch.empty(len(logits_TV), 2, dtype=torch.float64, device=logits_TV.device)
    _draw(
        logits_TV,
        temperature_T,
        seed_T,
        output_position_T,
        None,
        candidate_T2,
        None,
        first_id=first_id,
    )
    return candidate_T2


def draw_best(candidate_PT2: torch.Tensor, token_T: torch.Tensor) -> None:
    """Write the ids of the best of all parts' candidates (see `best`) into `token_T` (int64).

    Parts are in the order of their ids; ties go to the smallest id.
    """
    parts, num_rows, _ = candidate_PT2.shape
    _draw_best_kernel[(num_rows,)](
        candidate_PT2,
        token_T,
        parts,
        BLOCK_P=triton.next_power_of_2(parts),
        num_warps=1,
        launch_pdl=has_dependent_launch(token_T.device),
    )


def _draw(
    logits_TV: torch.Tensor,
    temperature_T: torch.Tensor,
    seed_T: torch.Tensor,
    output_position_T: torch.Tensor,
    token_T: torch.Tensor | None,
    candidate_T2: torch.Tensor | None,
    threshold_T: torch.Tensor | None,
    *,
    first_id: int = 0,
) -> None:
    num_rows, vocabulary = logits_TV.shape
    chunks = triton.cdiv(vocabulary, BLOCK_V)
    best_score = torch.empty(num_rows, chunks, dtype=torch.float32, device=logits_TV.device)
    best_token = torch.empty(num_rows, chunks, dtype=torch.int32, device=logits_TV.device)
    _scores_kernel[(num_rows, chunks)](
        logits_TV,
        temperature_T,
        seed_T,
        output_position_T,
        threshold_T,
        best_score,
        best_token,
        logits_TV.stride(0),
        vocabulary,
        first_id,
        ROUNDS=PHILOX_ROUNDS,
        MULTIPLIER_0=PHILOX_MULTIPLIERS[0],
        MULTIPLIER_1=PHILOX_MULTIPLIERS[1],
        WEYL_0=PHILOX_WEYL[0],
        WEYL_1=PHILOX_WEYL[1],
        HAS_THRESHOLD=threshold_T is not None,
        BLOCK_V=BLOCK_V,
        num_warps=4,
        enable_fp_fusion=False,  # a row is rounded alike with and without threshold, in any dtype
        launch_pdl=has_dependent_launch(logits_TV.device),
    )
    _best_kernel[(num_rows,)](
        best_score,
        best_token,
        token_T,
        candidate_T2,
        chunks,
        IS_PART=candidate_T2 is not None,
        BLOCK_C=triton.next_power_of_2(chunks),
        num_warps=1,
        launch_pdl=has_dependent_launch(logits_TV.device),
    )
