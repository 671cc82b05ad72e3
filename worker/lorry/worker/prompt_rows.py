"""Rows of a step whose logits tell how likely the prompt's own next token was.

Shape suffixes: S = sequences of the step, Q = those of them with such rows, P = the rows.
"""

from typing import NamedTuple

import numpy as np

from lorry.worker.drawn import DrawnLogprobs
from lorry.worker.messages import PromptLogprobs
from lorry.worker.sequences import SequenceTable

MAX_MESSAGE_ROWS = 4096  # 0.8 MiB with all alternatives


class PromptRows(NamedTuple):
    """Consecutive positions of each sequence; the row of position p is for token p + 1."""

    row_Q: np.ndarray  # of the sequence table
    admission_Q: np.ndarray
    first_Q: np.ndarray  # rows of the step before the sequence's first one that is asked for
    start_Q: np.ndarray  # position of that one
    length_Q: np.ndarray
    num_top_Q: np.ndarray  # alternatives of each token


class PromptTargets(NamedTuple):
    """What to compute, sequence after sequence."""

    step_row_P: np.ndarray
    token_id_P: np.ndarray  # the prompt's next token
    num_top_P: np.ndarray


def prompt_rows(
    table: SequenceTable, row_S: np.ndarray, start_S: np.ndarray, length_S: np.ndarray
) -> PromptRows | None:
    """Those of a step that were in no step before; the table counts them. None if no one asks."""
    num_top_S = table.prompt_logprobs_R[row_S]
    if not (num_top_S >= 0).any():
        return None
    from_S = np.maximum(start_S, table.num_prompt_reported_R[row_S])
    end_S = np.minimum(start_S + length_S, table.num_prompt_R[row_S] - 1)
    has_rows_S = (num_top_S >= 0) & (end_S > from_S)
    if not has_rows_S.any():
        return None
    table.num_prompt_reported_R[row_S[has_rows_S]] = end_S[has_rows_S]
    before_S = np.cumsum(length_S) - length_S
    parts = (
        row_S,
        table.admission_R[row_S],
        before_S + from_S - start_S,
        from_S,
        end_S - from_S,
        num_top_S,
    )
    return PromptRows(*(part[has_rows_S] for part in parts))


def prompt_targets(rows: PromptRows, table: SequenceTable) -> PromptTargets:
    owner_P = np.repeat(np.arange(len(rows.row_Q)), rows.length_Q)
    index_P = np.arange(len(owner_P)) - (np.cumsum(rows.length_Q) - rows.length_Q)[owner_P]
    return PromptTargets(
        rows.first_Q[owner_P] + index_P,
        table.token_ids_RC[rows.row_Q[owner_P], rows.start_Q[owner_P] + index_P + 1],
        rows.num_top_Q[owner_P],
    )


def prompt_messages(
    rows: PromptRows, logprobs: DrawnLogprobs, table: SequenceTable
) -> list[PromptLogprobs]:
    """What to tell of the sequences that still run; they are not told of it again.

    One that is preempted before goes through its prompt anew, and is told then.
    """
    messages: list[PromptLogprobs] = []
    end = 0
    parts = (rows.row_Q, rows.admission_Q, rows.start_Q, rows.length_Q)
    for row, admission, start, length in zip(*(part.tolist() for part in parts), strict=True):
        first, end = end, end + length
        request = table.requests[row]
        if request is None or table.admission_R[row] != admission:
            continue
        request.num_prompt_reported = start + length
        for offset in range(0, length, MAX_MESSAGE_ROWS):
            part = slice(first + offset, min(first + offset + MAX_MESSAGE_ROWS, end))
            message = logprobs.part(part).to_message()
            assert message is not None, "rows that no one asked for"
            messages.append(PromptLogprobs(request.number, start + offset + 1, message))
    return messages
