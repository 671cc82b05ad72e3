"""What changes the logits of a step's samples before they are drawn from.

Shape suffixes: N = rows that sample, L = known tokens, one sequence after the other.
"""

from typing import NamedTuple

import numpy as np

from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable


class StepAdjustments(NamedTuple):
    """Of each sample; see lorry.kernels.adjustments."""

    repetition_N: np.ndarray  # float32
    presence_N: np.ndarray  # float32
    frequency_N: np.ndarray  # float32
    num_biases_N: np.ndarray  # int32
    num_banned_N: np.ndarray  # int32


def step_adjustments(batch: Batch, table: SequenceTable) -> StepAdjustments | None:
    """None if nothing changes the step's logits."""
    row_N = batch.row_S[batch.samples_S]
    if not table.may_be_adjusted_R[row_N].any():
        return None
    is_early_N = _is_early(batch, table, row_N)
    if not (table.is_adjusted_R[row_N].any() or is_early_N.any()):
        return None
    return StepAdjustments(
        table.repetition_R[row_N],
        table.presence_R[row_N],
        table.frequency_R[row_N],
        table.num_biases_R[row_N],
        np.where(is_early_N, table.num_stop_ids_R[row_N], 0).astype(np.int32),
    )


def _is_early(batch: Batch, table: SequenceTable, row_N: np.ndarray) -> np.ndarray:
    """Whether a sample must not draw a stop token yet."""
    tokens_N = table.num_prompt_R[row_N] + batch.output_position_S[batch.samples_S]
    is_early_N: np.ndarray = tokens_N < table.min_tokens_R[row_N]
    return is_early_N


class KnownTokens(NamedTuple):
    """Tokens of sequences all of whose tokens have been read."""

    row_L: np.ndarray
    token_id_L: np.ndarray
    in_prompt_L: np.ndarray  # bool; else in the output


def known_tokens(rows: np.ndarray, table: SequenceTable) -> KnownTokens:
    length = table.num_read_R[rows]
    owner_L = np.repeat(np.arange(len(rows)), length)
    position_L = np.arange(len(owner_L)) - (np.cumsum(length) - length)[owner_L]
    row_L = rows[owner_L]
    return KnownTokens(
        row_L, table.token_ids_RC[row_L, position_L], position_L < table.num_prompt_R[row_L]
    )
