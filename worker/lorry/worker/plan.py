"""What the scheduler decided: the batch of one step and the effects that the engine carries out.

Shape suffix: S = sequences of the step.
"""

from dataclasses import dataclass, field

import numpy as np

from lorry.worker.messages import Finished
from lorry.worker.prompt_rows import PromptRows, prompt_rows
from lorry.worker.residency import Adapter
from lorry.worker.sequences import SequenceTable


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of a step, ordered by slot, so that rows of one adapter are consecutive."""

    step: int  # counts from 1
    row_S: np.ndarray  # rows of the sequence table
    admission_S: np.ndarray  # what tells a row's later tenant from this one
    start_S: np.ndarray  # first position to compute
    length_S: np.ndarray  # positions to compute, 1 for a decode
    slot_S: np.ndarray
    samples_S: np.ndarray  # bool; false for prompt chunks but the last
    output_position_S: np.ndarray  # of the token to draw, from 0
    prompt: PromptRows | None = None  # whose logits are reported

    @property
    def num_tokens(self) -> int:
        return int(self.length_S.sum())

    @property
    def is_decode_only(self) -> bool:
        return bool((self.length_S == 1).all())


@dataclass(slots=True)
class Plan:
    """One step's decisions, in the order in which the engine carries them out."""

    finished: list[Finished] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)  # requests
    evicted: list[bytes] = field(default_factory=list)  # versions; their pages may be reused
    fetches: list[bytes] = field(default_factory=list)
    loads: list[Adapter] = field(default_factory=list)  # copy the image into the pages
    batch: Batch | None = None


class BatchBuilder:
    """Collects the sequences of one step within its token budget and counts them as computed."""

    def __init__(self, table: SequenceTable, step_tokens: int) -> None:
        self.left = step_tokens
        self._table = table
        self._decodes = np.empty(0, dtype=np.int64)
        self._chunk_rows: list[int] = []
        self._chunk_lengths: list[int] = []

    def add_decodes(self, rows: np.ndarray) -> None:
        """One position of each row; called once, and before chunks."""
        assert len(rows) <= self.left, f"{len(rows)} decodes in {self.left} rows"
        self._decodes = rows
        self.left -= len(rows)

    def add_chunk(self, row: int) -> bool:
        """As many of the row's known tokens as there is room for; True if that is all of them."""
        table = self._table
        missing = int(table.num_tokens_R[row] - table.num_computed_R[row])
        length = min(missing, self.left)
        self.left -= length
        self._chunk_rows.append(row)
        self._chunk_lengths.append(length)
        return length == missing

    def build(self, step: int) -> Batch | None:
        """The batch of `step`, if there is anything to compute; the table then counts it."""
        table = self._table
        row = np.concatenate([self._decodes, np.array(self._chunk_rows, dtype=np.int64)])
        if not len(row):
            return None
        chunks = np.array(self._chunk_lengths, dtype=np.int64)
        length = np.concatenate([np.ones_like(self._decodes), chunks])
        order = np.lexsort((row, table.slot_R[row]))
        row, length = row[order], length[order]
        start, known = table.num_computed_R[row].copy(), table.num_tokens_R[row]
        samples = start + length == known
        batch = Batch(
            step=step,
            row_S=row,
            admission_S=table.admission_R[row],
            start_S=start,
            length_S=length,
            slot_S=table.slot_R[row],
            samples_S=samples,
            output_position_S=known - table.num_prompt_R[row],
            prompt=prompt_rows(table, row, start, length),
        )
        table.num_computed_R[row] += length
        table.num_tokens_R[row] += samples
        table.is_decoding_R[row] |= samples
        return batch
