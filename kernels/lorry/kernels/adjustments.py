"""Penalties, logit biases and bans: what changes logits before a token is drawn from them.

A table counts the tokens of each sequence: twice a token's occurrences in the output, and 1 more if
it is in the prompt. So 0 is a token that has not come yet.

Shape suffixes: T = rows that sample, R = rows of the sequence table, V = vocabulary, B = biases,
X = banned tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before

IN_PROMPT, IN_OUTPUT = 1, 2  # what an occurrence adds to a count; the prompt counts once
BLOCK_V = 2048


class SequenceTables(NamedTuple):
    """By row of the sequence table; beyond a row's number of biases or bans there is anything."""

    count_RV: torch.Tensor  # int32
    bias_id_RB: torch.Tensor  # int32, none twice in a row
    bias_RB: torch.Tensor  # float32
    banned_id_RX: torch.Tensor  # int32


class Adjustments(NamedTuple):
    """What applies to each row that samples."""

    state_row_T: torch.Tensor  # row of the sequence table
    repetition_T: torch.Tensor  # float32; 1 is off
    presence_T: torch.Tensor  # float32; 0 is off
    frequency_T: torch.Tensor  # float32; 0 is off
    num_biases_T: torch.Tensor
    num_banned_T: torch.Tensor

    @property
    def counts_T(self) -> torch.Tensor:
        """Rows whose tokens matter."""
        return (self.repetition_T != 1) | (self.presence_T != 0) | (self.frequency_T != 0)


def adjust_reference(
    logits_TV: torch.Tensor, tables: SequenceTables, rows: Adjustments
) -> torch.Tensor:
    """Logits to draw from, in float32.

    The repetition penalty divides positive logits of tokens that have come, and multiplies others;
    then frequency x occurrences in the output and, if there is one, presence are subtracted; then
    biases are added; banned tokens get -inf.
    """
    logits_TV = logits_TV.float()
    repetition, presence, frequency = rows.repetition_T, rows.presence_T, rows.frequency_T
    count_TV = tables.count_RV[rows.state_row_T]
    repeated_TV = torch.where(
        logits_TV > 0, logits_TV / repetition[:, None], logits_TV * repetition[:, None]
    )
    penalized_TV = torch.where(count_TV != 0, repeated_TV, logits_TV)
    penalized_TV = penalized_TV - frequency[:, None] * (count_TV // IN_OUTPUT)
    penalized_TV = penalized_TV - presence[:, None] * (count_TV >= IN_OUTPUT)
    adjusted_TV = torch.where(rows.counts_T[:, None], penalized_TV, logits_TV)
    _add_biases(adjusted_TV, tables, rows)
    _ban(adjusted_TV, tables, rows)
    return adjusted_TV


def _add_biases(logits_TV: torch.Tensor, tables: SequenceTables, rows: Adjustments) -> None:
    bias_TB = tables.bias_RB[rows.state_row_T]
    in_row_TB = _first(rows.num_biases_T, bias_TB.shape[1])
    id_TB = tables.bias_id_RB[rows.state_row_T].where(in_row_TB, 0)
    logits_TV.scatter_add_(1, id_TB.long(), bias_TB.where(in_row_TB, 0))


def _ban(logits_TV: torch.Tensor, tables: SequenceTables, rows: Adjustments) -> None:
    id_TX = tables.banned_id_RX[rows.state_row_T]
    in_row_TX = _first(rows.num_banned_T, id_TX.shape[1])
    ban_TX = torch.where(in_row_TX, -torch.inf, 0.0)
    logits_TV.scatter_add_(1, id_TX.where(in_row_TX, 0).long(), ban_TX)


def _first(number_T: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width, device=number_T.device) < number_T[:, None]


@triton.jit
def _penalize_kernel(
    logits_ptr,  # [T, V]
    state_row_ptr,  # [T]
    repetition_ptr,  # [T]
    presence_ptr,  # [T]
    frequency_ptr,  # [T]
    count_ptr,  # [R, V]
    adjusted_ptr,  # [T, V], float32
    stride_lt,
    vocabulary,
    BLOCK_V: tl.constexpr,
):
    """A chunk of a row; rows without penalties read no counts."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = token < vocabulary
    logits = tl.load(logits_ptr + row * stride_lt + token, mask=in_row).to(tl.float32)
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (repetition != 1) | (presence != 0) | (frequency != 0):
        state_row = tl.load(state_row_ptr + row).to(tl.int64)
        count = tl.load(count_ptr + state_row * vocabulary + token, mask=in_row, other=0)
        repeated = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
        penalized = tl.where(count != 0, repeated, logits)
        penalized -= frequency * (count // 2).to(tl.float32)
        penalized -= tl.where(count >= 2, presence, 0.0)
        tl.store(adjusted_ptr + row * vocabulary + token, penalized, mask=in_row)
    else:
        tl.store(adjusted_ptr + row * vocabulary + token, logits, mask=in_row)


@triton.jit
def _edit_kernel(
    adjusted_ptr,  # [T, V]
    state_row_ptr,  # [T]
    num_biases_ptr,  # [T]
    num_banned_ptr,  # [T]
    bias_id_ptr,  # [R, B]
    bias_ptr,  # [R, B]
    banned_id_ptr,  # [R, X]
    stride_br,  # of biases and their ids
    stride_xr,
    vocabulary,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One row's biases, then its bans."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    num_biases = tl.load(num_biases_ptr + row)
    num_banned = tl.load(num_banned_ptr + row)
    state_row = tl.load(state_row_ptr + row).to(tl.int64)
    adjusted_ptr += row * vocabulary
    if num_biases > 0:
        place = tl.arange(0, BLOCK_B)
        in_row = place < num_biases
        token = tl.load(bias_id_ptr + state_row * stride_br + place, mask=in_row, other=0)
        bias = tl.load(bias_ptr + state_row * stride_br + place, mask=in_row, other=0.0)
        logits = tl.load(adjusted_ptr + token, mask=in_row, other=0.0)
        tl.store(adjusted_ptr + token, logits + bias, mask=in_row)
    if num_banned > 0:
        tl.debug_barrier()  # another thread may have stored the bias of a token that is banned
        place = tl.arange(0, BLOCK_X)
        in_row = place < num_banned
        token = tl.load(banned_id_ptr + state_row * stride_xr + place, mask=in_row, other=0)
        tl.store(adjusted_ptr + token, -float("inf"), mask=in_row)


def adjust(logits_TV: torch.Tensor, tables: SequenceTables, rows: Adjustments) -> torch.Tensor:
    """Logits to draw from, in float32, as `adjust_reference`, up to the rounding of penalties."""
    num_rows, vocabulary = logits_TV.shape
    adjusted_TV = torch.empty(num_rows, vocabulary, dtype=torch.float32, device=logits_TV.device)
    _penalize_kernel[(num_rows, triton.cdiv(vocabulary, BLOCK_V))](
        logits_TV,
        rows.state_row_T,
        rows.repetition_T,
        rows.presence_T,
        rows.frequency_T,
        tables.count_RV,
        adjusted_TV,
        logits_TV.stride(0),
        vocabulary,
        BLOCK_V=BLOCK_V,
        num_warps=4,
        launch_pdl=has_dependent_launch(logits_TV.device),
    )
    _edit_kernel[(num_rows,)](
        adjusted_TV,
        rows.state_row_T,
        rows.num_biases_T,
        rows.num_banned_T,
        tables.bias_id_RB,
        tables.bias_RB,
        tables.banned_id_RX,
        tables.bias_id_RB.stride(0),
        tables.banned_id_RX.stride(0),
        vocabulary,
        BLOCK_B=triton.next_power_of_2(tables.bias_id_RB.shape[1]),
        BLOCK_X=triton.next_power_of_2(tables.banned_id_RX.shape[1]),
        num_warps=4,
        launch_pdl=has_dependent_launch(logits_TV.device),
    )
    return adjusted_TV


def count_drawn(tables: SequenceTables, rows: Adjustments, token_T: torch.Tensor) -> None:
    """Count the tokens that were drawn, of the rows whose tokens matter."""
    place_T = rows.state_row_T.long() * tables.count_RV.shape[1] + token_T
    tables.count_RV.view(-1).scatter_add_(0, place_T, rows.counts_T.int() * IN_OUTPUT)
