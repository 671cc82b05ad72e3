"""The block table on the device, kept up to date by what each step adds to it.

Shape suffixes: R = rows of the sequence table, P = pages of a sequence, U = new pages of a step.
"""

from collections.abc import Mapping

import numpy as np
import torch

from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable


class SequencePages:
    """The device's block table, and what it holds as far as launched steps go."""

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        self.table_RP = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self._num_pages_R = np.zeros(rows, dtype=np.int64)
        self._admission_R = np.zeros(rows, dtype=np.int64)

    def changes(self, batch: Batch, table: SequenceTable) -> tuple[np.ndarray, np.ndarray]:
        """Places and pages of the batch's sequences that the device does not know yet."""
        row_S = batch.row_S
        is_known = self._admission_R[row_S] == batch.admission_S
        known_S = np.where(is_known, self._num_pages_R[row_S], 0)
        count_S = table.num_pages_R[row_S] - known_S
        self._admission_R[row_S] = batch.admission_S
        self._num_pages_R[row_S] = table.num_pages_R[row_S]
        owner_U = np.repeat(np.arange(len(row_S)), count_S)
        before_S = np.cumsum(count_S) - count_S
        index_U = known_S[owner_U] + np.arange(len(owner_U)) - before_S[owner_U]
        row_U = row_S[owner_U]
        return row_U * self.table_RP.shape[1] + index_U, table.block_table_RP[row_U, index_U]

    def write(self, buffers: Mapping[str, torch.Tensor], count: int) -> None:
        """Write the first `count` new pages of the step buffers, in the current stream's order."""
        if count:
            self.table_RP.view(-1)[buffers["page_place"][:count]] = buffers["new_page"][:count]

    def write_now(self, place_U: np.ndarray, page_U: np.ndarray) -> None:
        """Write new pages that do not fit into the step buffers; waits for the copy."""
        device = self.table_RP.device
        page = torch.from_numpy(page_U.astype(np.int32)).to(device)
        self.table_RP.view(-1)[torch.from_numpy(place_U).to(device)] = page
