"""A step's rows and samples as arrays, made from its batch and the sequence table.

Shape suffixes: T = rows of the step, S = sequences of the step, N = rows that sample.
"""

import enum
from collections.abc import Mapping

import numpy as np

from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable


class HeadKind(enum.Enum):
    """What a step's samples need beyond their logits."""

    PLAIN = enum.auto()  # temperature
    FULL = enum.auto()  # also top-k, top-p, min-p and logprobs
    ADJUSTED = enum.auto()  # also penalties, biases, and stop tokens that must not come yet


def step_arrays(batch: Batch, table: SequenceTable) -> dict[str, np.ndarray]:
    """Fields of the step's rows (T) and samples (N): sequence after sequence, in batch order.

    A token id below 0 is -1 - row of the sequence whose newest token no step's results told yet.
    """
    first_S = np.cumsum(batch.length_S) - batch.length_S
    owner_T = np.repeat(np.arange(len(batch.row_S)), batch.length_S)
    position_T = batch.start_S[owner_T] + np.arange(batch.num_tokens) - first_S[owner_T]
    row_T = batch.row_S[owner_T]
    token_T = np.where(
        position_T < table.num_read_R[row_T], table.token_ids_RC[row_T, position_T], -1 - row_T
    )
    row_N = batch.row_S[batch.samples_S]
    return {
        "token_id": token_T,
        "position": position_T,
        "page": table.block_table_RP[row_T, position_T // table.page_tokens],
        "sequence": row_T,
        "slot": batch.slot_S[owner_T],
        "sample_row": (first_S + batch.length_S - 1)[batch.samples_S],
        "state_row": row_N,
        "seed": table.seed_R[row_N],
        "temperature": table.temperature_R[row_N],
        "top_k": table.top_k_R[row_N],
        "top_p": table.top_p_R[row_N],
        "min_p": table.min_p_R[row_N],
        "num_top": table.top_logprobs_R[row_N],
        "output_position": batch.output_position_S[batch.samples_S],
    }


def head_kind(arrays: Mapping[str, np.ndarray], *, is_adjusted: bool) -> HeadKind:
    """The least of heads that does what the step's samples ask for."""
    if is_adjusted:
        return HeadKind.ADJUSTED
    is_cut_N = (arrays["top_k"] > 0) | (arrays["top_p"] < 1) | (arrays["min_p"] > 0)
    is_cut_N &= arrays["temperature"] > 0
    is_plain = not (is_cut_N.any() or (arrays["num_top"] >= 0).any())
    return HeadKind.PLAIN if is_plain else HeadKind.FULL
