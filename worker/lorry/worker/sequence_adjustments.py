"""Counts of tokens, biases and banned tokens on the device, by row of the sequence table.

A sequence's tables are written when it first draws since its admission: all its tokens are known to
the host then. From there on the device counts what it draws, so that a step can be launched before
the last one's tokens are read. Steps that adjust nothing touch none of this.

Shape suffixes: R = rows of the sequence table, N = rows that sample, V = vocabulary, B = biases,
X = stop tokens, W = biases, their ids and stop tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from lorry.kernels.adjustments import IN_OUTPUT, IN_PROMPT, Adjustments, SequenceTables
from lorry.worker.plan import Batch
from lorry.worker.sequences import MAX_LOGIT_BIASES, MAX_STOP_IDS, SequenceTable
from lorry.worker.step_adjustments import KnownTokens, known_tokens, step_adjustments
from lorry.worker.transfers import to_device

NUM_FIELDS = 5
NEUTRAL = 1.0  # a repetition penalty


def table_bytes(num_rows: int, vocabulary: int) -> int:
    """What the tables take of the device's memory."""
    return (num_rows + 1) * (vocabulary + 2 * MAX_LOGIT_BIASES + MAX_STOP_IDS) * 4


class NewRows(NamedTuple):
    """What a step's samples begin with since their admission."""

    row_N: np.ndarray
    edits_NW: np.ndarray  # int32: biases, their ids, stop ids
    counted: np.ndarray  # rows whose counts begin anew, with the tokens below
    known: KnownTokens


class StepChange(NamedTuple):
    """What a step writes before its samples are adjusted."""

    fields: np.ndarray  # int32, by sample
    new: NewRows | None


class SequenceAdjustments:
    def __init__(
        self,
        num_rows: int,
        vocabulary: int,
        device: torch.device,
        *,
        columns: Callable[[np.ndarray], np.ndarray] = lambda token_ids: token_ids,
    ) -> None:
        """`columns` are the places of token ids among the `vocabulary`."""
        # The last row belongs to nobody; padded samples have it.
        edits_RW = torch.zeros(
            num_rows + 1, 2 * MAX_LOGIT_BIASES + MAX_STOP_IDS, dtype=torch.int32, device=device
        )
        bias, bias_id, stop_id = edits_RW.split(
            [MAX_LOGIT_BIASES, MAX_LOGIT_BIASES, MAX_STOP_IDS], dim=1
        )
        count_RV = torch.zeros(num_rows + 1, vocabulary, dtype=torch.int32, device=device)
        self.tables = SequenceTables(count_RV, bias_id, bias.view(torch.float32), stop_id)
        self._edits_RW = edits_RW
        self._fields = torch.zeros(NUM_FIELDS, num_rows, dtype=torch.int32, device=device)
        self._fields[0].view(torch.float32).fill_(NEUTRAL)
        self._columns = columns
        self._admission_R = np.zeros(num_rows, dtype=np.int64)

    def change(self, batch: Batch, table: SequenceTable) -> StepChange | None:
        """What `apply` is to write for the step; None if nothing."""
        step = step_adjustments(batch, table)
        if step is None:
            return None
        row_N = batch.row_S[batch.samples_S]
        needs_N = table.is_adjusted_R[row_N] | (step.num_banned_N > 0)
        is_new_N = needs_N & (self._admission_R[row_N] != table.admission_R[row_N])
        fields = np.zeros(self._fields.shape, dtype=np.int32)
        fields[0] = np.float32(NEUTRAL).view(np.int32)
        for field, values in zip(fields, step, strict=True):
            field[: len(values)] = values.view(np.int32)
        return StepChange(fields, self._begin(row_N[is_new_N], table) if is_new_N.any() else None)

    def apply(self, change: StepChange) -> None:
        """In the current stream's order."""
        if change.new is not None:
            self._write(change.new)
        self._fields.copy_(to_device(change.fields, self._fields.device), non_blocking=True)

    def of(self, state_row_N: torch.Tensor) -> Adjustments:
        """Views of what applies to the step's first samples."""
        numbers = self._fields[:, : len(state_row_N)]
        penalties = numbers[:3].view(torch.float32)
        return Adjustments(state_row_N, *penalties, *numbers[3:])

    def _begin(self, rows: np.ndarray, table: SequenceTable) -> NewRows:
        self._admission_R[rows] = table.admission_R[rows]
        width = table.stop_ids_RX.shape[1]
        edits = np.zeros((len(rows), self._edits_RW.shape[1]), dtype=np.int32)
        edits[:, :MAX_LOGIT_BIASES] = table.bias_RB[rows].view(np.int32)
        edits[:, MAX_LOGIT_BIASES : 2 * MAX_LOGIT_BIASES] = table.bias_id_RB[rows]
        edits[:, 2 * MAX_LOGIT_BIASES :][:, :width] = table.stop_ids_RX[rows]
        counted = rows[table.is_penalized_R[rows]]
        known = known_tokens(counted, table)
        return NewRows(rows, edits, counted, known)

    def _write(self, new: NewRows) -> None:
        device, counts = self._edits_RW.device, self.tables.count_RV
        edits = new.edits_NW.copy()
        edits[:, MAX_LOGIT_BIASES:] = self._columns(edits[:, MAX_LOGIT_BIASES:])
        self._edits_RW.index_copy_(0, to_device(new.row_N, device), to_device(edits, device))
        known = new.known
        place = known.row_L * counts.shape[1] + self._columns(known.token_id_L)
        parts = [new.counted, place[known.in_prompt_L], place[~known.in_prompt_L]]
        indices = to_device(np.concatenate(parts), counts.device)
        row, in_prompt, in_output = indices.split([len(part) for part in parts])
        counts.index_fill_(0, row, 0)
        counts.view(-1).index_fill_(0, in_prompt, IN_PROMPT)
        occurrence = torch.full((1,), IN_OUTPUT, dtype=torch.int32, device=counts.device)
        counts.view(-1).scatter_add_(0, in_output, occurrence.expand(len(in_output)))
