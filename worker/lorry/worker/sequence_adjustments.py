"""Counts of tokens, biases and banned tokens on the device, by row of the sequence table.

A sequence's tables are written when it first draws since its admission: all its tokens are known to
the host then. From there on the device counts what it draws, so that a step can be launched before
the last one's tokens are read. Steps that adjust nothing touch none of this.

Shape suffixes: R = rows of the sequence table, N = rows that sample, V = vocabulary, B = biases,
X = stop tokens, W = biases, their ids and stop tokens.
"""

import numpy as np
import torch

from lorry.kernels.adjustments import IN_OUTPUT, IN_PROMPT, Adjustments, SequenceTables
from lorry.worker.plan import Batch
from lorry.worker.sequences import MAX_LOGIT_BIASES, MAX_STOP_IDS, SequenceTable
from lorry.worker.step_adjustments import known_tokens, step_adjustments
from lorry.worker.transfers import to_device

NUM_FIELDS = 5
NEUTRAL = 1.0  # a repetition penalty


def table_bytes(num_rows: int, vocabulary: int) -> int:
    """What the tables take of the device's memory."""
    return (num_rows + 1) * (vocabulary + 2 * MAX_LOGIT_BIASES + MAX_STOP_IDS) * 4


class SequenceAdjustments:
    def __init__(self, num_rows: int, vocabulary: int, device: torch.device) -> None:
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
        self._admission_R = np.zeros(num_rows, dtype=np.int64)

    def prepare(self, batch: Batch, table: SequenceTable) -> bool:
        """Write what the step's samples need, in the current stream's order; False if nothing."""
        step = step_adjustments(batch, table)
        if step is None:
            return False
        row_N = batch.row_S[batch.samples_S]
        needs_N = table.is_adjusted_R[row_N] | (step.num_banned_N > 0)
        is_new_N = needs_N & (self._admission_R[row_N] != table.admission_R[row_N])
        if is_new_N.any():
            self._begin(row_N[is_new_N], table)
        fields = np.zeros(self._fields.shape, dtype=np.int32)
        fields[0] = np.float32(NEUTRAL).view(np.int32)
        for field, values in zip(fields, step, strict=True):
            field[: len(values)] = values.view(np.int32)
        self._fields.copy_(to_device(fields, self._fields.device), non_blocking=True)
        return True

    def of(self, state_row_N: torch.Tensor) -> Adjustments:
        """Views of what applies to the step's first samples."""
        numbers = self._fields[:, : len(state_row_N)]
        penalties = numbers[:3].view(torch.float32)
        return Adjustments(state_row_N, *penalties, *numbers[3:])

    def _begin(self, rows: np.ndarray, table: SequenceTable) -> None:
        self._admission_R[rows] = table.admission_R[rows]
        width = table.stop_ids_RX.shape[1]
        edits = np.zeros((len(rows), self._edits_RW.shape[1]), dtype=np.int32)
        edits[:, :MAX_LOGIT_BIASES] = table.bias_RB[rows].view(np.int32)
        edits[:, MAX_LOGIT_BIASES : 2 * MAX_LOGIT_BIASES] = table.bias_id_RB[rows]
        edits[:, 2 * MAX_LOGIT_BIASES :][:, :width] = table.stop_ids_RX[rows]
        device = self._edits_RW.device
        self._edits_RW.index_copy_(0, to_device(rows, device), to_device(edits, device))
        self._count(rows[table.is_penalized_R[rows]], table)

    def _count(self, rows: np.ndarray, table: SequenceTable) -> None:
        """Count the tokens that the host knows of sequences that are penalized."""
        known = known_tokens(rows, table)
        counts = self.tables.count_RV
        place = known.row_L * counts.shape[1] + known.token_id_L
        parts = [rows, place[known.in_prompt_L], place[~known.in_prompt_L]]
        indices = to_device(np.concatenate(parts), counts.device)
        row, in_prompt, in_output = indices.split([len(part) for part in parts])
        counts.index_fill_(0, row, 0)
        counts.view(-1).index_fill_(0, in_prompt, IN_PROMPT)
        occurrence = torch.full((1,), IN_OUTPUT, dtype=torch.int32, device=counts.device)
        counts.view(-1).scatter_add_(0, in_output, occurrence.expand(len(in_output)))
