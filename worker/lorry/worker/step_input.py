"""The tensors of one step, made from its batch and the sequence table.

Shape suffixes: T = rows of the step (tokens), S = sequences of the step, P = pages of a sequence,
N = rows that sample.
"""

from dataclasses import dataclass

import numpy as np
import torch

from lorry.kernels.page_layout import BASE_MODEL
from lorry.kernels.tiles import RowTiles, cut_tiles
from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable

PROMPT_TILE_ROWS = 16
LORA_TILE_ROWS = 16


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """How the rows that sample draw."""

    temperature_N: torch.Tensor
    seed_N: torch.Tensor  # int64, the bits of an unsigned seed
    output_position_N: torch.Tensor
    banned_NX: torch.Tensor | None  # token ids that must not be drawn yet, padded with -1


@dataclass(frozen=True, slots=True)
class StepInput:
    token_id_T: torch.Tensor
    position_T: torch.Tensor
    page_T: torch.Tensor  # where the row's KV goes
    block_table_SP: torch.Tensor
    attention_tiles: RowTiles
    lora_tiles: RowTiles
    sample_row_N: torch.Tensor
    sampling: SamplingInput


def build_step_input(batch: Batch, table: SequenceTable, device: torch.device) -> StepInput:
    """Lay out the step's rows on `device`: sequence after sequence, in the batch's order."""
    first_S = np.cumsum(batch.length_S) - batch.length_S
    sequence_T = np.repeat(np.arange(len(batch.row_S)), batch.length_S)
    offset_T = np.arange(batch.num_tokens) - first_S[sequence_T]
    position_T = batch.start_S[sequence_T] + offset_T
    row_T = batch.row_S[sequence_T]
    most_pages = -(-int((batch.start_S + batch.length_S).max()) // table.page_tokens)
    last_S = first_S + batch.length_S - 1
    return StepInput(
        token_id_T=_tensor(table.token_ids_RC[row_T, position_T], device),
        position_T=_tensor(position_T, device),
        page_T=_tensor(table.block_table_RP[row_T, position_T // table.page_tokens], device),
        block_table_SP=_tensor(table.block_table_RP[batch.row_S, :most_pages], device),
        attention_tiles=cut_tiles(
            np.arange(len(batch.row_S)),
            first_S,
            batch.length_S,
            tile_rows=1 if batch.is_decode_only else PROMPT_TILE_ROWS,
            num_rows=batch.num_tokens,
        ).to(device),
        lora_tiles=_lora_tiles(batch).to(device),
        sample_row_N=_tensor(last_S[batch.samples_S], device),
        sampling=_sampling_input(batch, table, device),
    )


def _lora_tiles(batch: Batch) -> RowTiles:
    """Segments of consecutive rows that share a slot, cut into tiles; base rows left out."""
    slot_S = batch.slot_S
    starts = np.flatnonzero(np.diff(slot_S, prepend=BASE_MODEL - 1))
    row_starts = np.concatenate([[0], np.cumsum(batch.length_S)])
    first = row_starts[starts]
    length = np.diff(np.append(first, row_starts[-1]))
    adapters = slot_S[starts] != BASE_MODEL
    return cut_tiles(
        slot_S[starts][adapters],
        first[adapters],
        length[adapters],
        tile_rows=LORA_TILE_ROWS,
        num_rows=batch.num_tokens,
    )


def _sampling_input(batch: Batch, table: SequenceTable, device: torch.device) -> SamplingInput:
    row_N = batch.row_S[batch.samples_S]
    output_position_N = batch.output_position_S[batch.samples_S]
    tokens_N = table.num_prompt_R[row_N] + output_position_N
    early = tokens_N < table.min_tokens_R[row_N]
    stop_NX = np.where(early[:, None], table.stop_ids_RX[row_N], -1)
    return SamplingInput(
        temperature_N=_tensor(table.temperature_R[row_N], device),
        seed_N=_tensor(table.seed_R[row_N], device),
        output_position_N=_tensor(output_position_N, device),
        banned_NX=_tensor(stop_NX, device) if early.any() else None,
    )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    dtype = np.int64 if array.dtype.kind == "i" else array.dtype
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device)
