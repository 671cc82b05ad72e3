"""Raw logprobs: the log-softmax of the chosen token and of the most likely ones, for rows that ask.

The first kernel ranks each chunk of a row before anything changes the logits, the second merges the
chunks once the row's token is known. Rows that do not ask cost a program that ends at once.

Shape suffixes: T = rows that sample, V = vocabulary, C = chunks of a row, X = alternatives.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before

MAX_TOP = 20  # alternatives of a row, of the protocol
NOT_ASKED = -1  # number of alternatives of a row that asks for no logprobs
BLOCK_V = 2048  # of a chunk


class Logprobs(NamedTuple):
    """Rows that did not ask, and places beyond the number asked for, hold anything."""

    chosen_T: torch.Tensor  # float32
    top_id_TX: torch.Tensor  # int32, most likely first
    top_logprob_TX: torch.Tensor  # float32


class RankedChunks(NamedTuple):
    """What is kept of each chunk of the logits."""

    most_TC: torch.Tensor  # float32
    mass_TC: torch.Tensor  # float32; sum of exp(logit - most)
    top_logit_TCX: torch.Tensor  # float32
    top_id_TCX: torch.Tensor  # int32


def packed_logprobs(num_rows: int, device: torch.device) -> torch.Tensor:
    """Room for the logprobs of rows, one after the other, to be copied as one; int32."""
    return torch.zeros(num_rows, 1 + 2 * MAX_TOP, dtype=torch.int32, device=device)


def unpacked(packed_TY: torch.Tensor) -> Logprobs:
    """Views of what `packed_logprobs` made, or of its first rows."""
    chosen, top_id, top_logprob = packed_TY.split([1, MAX_TOP, MAX_TOP], dim=1)
    return Logprobs(chosen[:, 0].view(torch.float32), top_id, top_logprob.view(torch.float32))


def logprobs_reference(
    logits_TV: torch.Tensor, token_T: torch.Tensor, num_top_T: torch.Tensor
) -> Logprobs:
    """Logprobs in nats of the model's own logits; of equal ones the smallest id comes first.

    `num_top_T` is the number of alternatives, at most the vocabulary; NOT_ASKED gives zeros.
    """
    result = unpacked(packed_logprobs(len(logits_TV), logits_TV.device))
    row = (num_top_T >= 0).nonzero()[:, 0]
    if row.numel():
        logits_TV = logits_TV[row].float()
        logprob_TV = logits_TV.log_softmax(dim=-1)
        result.chosen_T[row] = logprob_TV.gather(1, token_T[row, None])[:, 0]
        id_TX = logits_TV.sort(dim=-1, descending=True, stable=True).indices[:, :MAX_TOP]
        result.top_id_TX[row, : id_TX.shape[1]] = id_TX.int()
        result.top_logprob_TX[row, : id_TX.shape[1]] = logprob_TV.gather(1, id_TX)
    return result


@triton.jit
def _rank_kernel(
    logits_ptr,  # [T, V]
    num_top_ptr,  # [T]
    most_ptr,  # [T, C]
    mass_ptr,  # [T, C]
    top_logit_ptr,  # [T, C, X]
    top_id_ptr,  # [T, C, X]
    stride_lt,
    vocabulary,
    MAX_TOP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum and largest logits of a chunk of a row."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_top = tl.load(num_top_ptr + row)
    if num_top >= 0:
        lane = tl.arange(0, BLOCK_V)
        token = chunk * BLOCK_V + lane
        in_row = token < vocabulary
        logits = tl.load(logits_ptr + row * stride_lt + token, mask=in_row, other=-float("inf"))
        logits = logits.to(tl.float32)
        logits = tl.where(logits == logits, logits, -float("inf"))  # a NaN's place is arbitrary
        most = tl.max(logits, 0)
        at = row * tl.num_programs(1) + chunk
        tl.store(most_ptr + at, most)
        tl.store(mass_ptr + at, tl.sum(tl.exp(logits - most), 0))
        for place in range(num_top):
            best, best_lane = tl.max(
                logits, 0, return_indices=True, return_indices_tie_break_left=True
            )
            tl.store(top_logit_ptr + at * MAX_TOP + place, best)
            tl.store(top_id_ptr + at * MAX_TOP + place, chunk * BLOCK_V + best_lane)
            logits = tl.where(lane == best_lane, -float("inf"), logits)


@triton.jit
def _logprobs_kernel(
    logits_ptr,  # [T, V]
    token_ptr,  # [T]
    num_top_ptr,  # [T]
    most_ptr,  # [T, C]
    mass_ptr,  # [T, C]
    top_logit_ptr,  # [T, C, X]
    top_id_ptr,  # [T, C, X]
    chosen_ptr,  # [T]
    out_id_ptr,  # [T, X]
    out_logprob_ptr,  # [T, X]
    stride_lt,
    stride_ot,  # of all outputs
    chunks,
    MAX_TOP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge a row's chunks. Places are in the order of ids where their logits are equal."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    num_top = tl.load(num_top_ptr + row)
    if num_top >= 0:
        chunk = tl.arange(0, BLOCK_C)
        most_C = tl.load(most_ptr + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
        mass_C = tl.load(mass_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
        most = tl.max(most_C, 0)
        log_mass = tl.log(tl.sum(mass_C * tl.exp(most_C - most), 0))
        token = tl.load(token_ptr + row)
        logit = tl.load(logits_ptr + row * stride_lt + token).to(tl.float32)
        tl.store(chosen_ptr + row * stride_ot, logit - most - log_mass)
        place = tl.arange(0, BLOCK_P)
        is_ranked = (place < chunks * MAX_TOP) & (place % MAX_TOP < num_top)
        top_logit_ptr += row * chunks * MAX_TOP
        logits = tl.load(top_logit_ptr + place, mask=is_ranked, other=-float("inf"))
        for index in range(num_top):
            best, best_place = tl.max(
                logits, 0, return_indices=True, return_indices_tie_break_left=True
            )
            best_id = tl.load(top_id_ptr + row * chunks * MAX_TOP + best_place)
            tl.store(out_id_ptr + row * stride_ot + index, best_id)
            tl.store(out_logprob_ptr + row * stride_ot + index, best - most - log_mass)
            logits = tl.where(place == best_place, -float("inf"), logits)


def rank(logits_TV: torch.Tensor, num_top_T: torch.Tensor) -> RankedChunks:
    """What `write_logprobs` needs of logits that may be changed in the meantime."""
    num_rows, vocabulary = logits_TV.shape
    chunks, device = triton.cdiv(vocabulary, BLOCK_V), logits_TV.device
    ranked = RankedChunks(
        torch.empty(num_rows, chunks, dtype=torch.float32, device=device),
        torch.empty(num_rows, chunks, dtype=torch.float32, device=device),
        torch.empty(num_rows, chunks, MAX_TOP, dtype=torch.float32, device=device),
        torch.empty(num_rows, chunks, MAX_TOP, dtype=torch.int32, device=device),
    )
    _rank_kernel[(num_rows, chunks)](
        logits_TV,
        num_top_T,
        *ranked,
        logits_TV.stride(0),
        vocabulary,
        MAX_TOP=MAX_TOP,
        BLOCK_V=BLOCK_V,
        num_warps=4,
        launch_pdl=has_dependent_launch(device),
    )
    return ranked


def write_logprobs(
    logits_TV: torch.Tensor,
    ranked: RankedChunks,
    token_T: torch.Tensor,
    num_top_T: torch.Tensor,
    out: Logprobs,
) -> None:
    """Fill `out`, views of packed rows, as `logprobs_reference` where rows ask.

    The logits may differ from what was ranked where they cannot be drawn.
    """
    num_rows, chunks = ranked.most_TC.shape
    _logprobs_kernel[(num_rows,)](
        logits_TV,
        token_T,
        num_top_T,
        *ranked,
        *out,
        logits_TV.stride(0),
        out.chosen_T.stride(0),
        chunks,
        MAX_TOP=MAX_TOP,
        BLOCK_C=triton.next_power_of_2(chunks),
        BLOCK_P=triton.next_power_of_2(chunks * MAX_TOP),
        num_warps=4,
        launch_pdl=has_dependent_launch(logits_TV.device),
    )
