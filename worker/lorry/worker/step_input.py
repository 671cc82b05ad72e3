"""The tensors of one step, made from its batch and the sequence table.

Shape suffixes: T = rows of the step (tokens), S = sequences of the step, P = pages of a sequence,
N = rows that sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lorry.kernels.page_layout import BASE_MODEL
from lorry.kernels.tiles import RowTiles, cut_tiles
from lorry.worker.plan import Batch
from lorry.worker.sequences import SequenceTable
from lorry.worker.step_arrays import step_arrays

PROMPT_TILE_ROWS = 16
LORA_TILE_ROWS = 16


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """How the rows that sample draw, and what of it is reported."""

    temperature_N: torch.Tensor
    seed_N: torch.Tensor  # int64, the bits of an unsigned seed
    output_position_N: torch.Tensor
    top_k_N: torch.Tensor
    top_p_N: torch.Tensor
    min_p_N: torch.Tensor
    num_top_N: torch.Tensor  # alternatives to report, or NOT_ASKED


@dataclass(frozen=True, slots=True)
class StepInput:
    token_id_T: torch.Tensor  # or -1 - row of the sequence whose last drawn token it is
    position_T: torch.Tensor
    page_T: torch.Tensor  # where the row's KV goes
    block_table_SP: torch.Tensor
    attention_tiles: RowTiles
    lora_tiles: RowTiles
    sample_row_N: torch.Tensor
    state_row_N: torch.Tensor  # rows of the sequence table
    sampling: SamplingInput


def host_step_arrays(batch: Batch, table: SequenceTable) -> dict[str, np.ndarray]:
    """The fields of `step_arrays`, and of what the references need beside them."""
    most_pages = -(-int((batch.start_S + batch.length_S).max()) // table.page_tokens)
    attention = cut_tiles(
        np.arange(len(batch.row_S)),
        np.cumsum(batch.length_S) - batch.length_S,
        batch.length_S,
        tile_rows=1 if batch.is_decode_only else PROMPT_TILE_ROWS,
        num_rows=batch.num_tokens,
    )
    lora = _lora_tiles(batch)
    return {
        **step_arrays(batch, table),
        "block_table": table.block_table_RP[batch.row_S, :most_pages],
        "attention_owner": attention.owner_N.numpy(),
        "attention_row": attention.row_NM.numpy(),
        "lora_owner": lora.owner_N.numpy(),
        "lora_row": lora.row_NM.numpy(),
    }


def to_step_input(arrays: Mapping[str, np.ndarray], device: torch.device) -> StepInput:
    """Lay out the step's rows on `device`."""
    tensors = {name: _tensor(array, device) for name, array in arrays.items()}
    return StepInput(
        token_id_T=tensors["token_id"],
        position_T=tensors["position"],
        page_T=tensors["page"],
        block_table_SP=tensors["block_table"],
        attention_tiles=RowTiles(tensors["attention_owner"], tensors["attention_row"]),
        lora_tiles=RowTiles(tensors["lora_owner"], tensors["lora_row"]),
        sample_row_N=tensors["sample_row"],
        state_row_N=tensors["state_row"],
        sampling=SamplingInput(
            temperature_N=tensors["temperature"],
            seed_N=tensors["seed"],
            output_position_N=tensors["output_position"],
            top_k_N=tensors["top_k"],
            top_p_N=tensors["top_p"],
            min_p_N=tensors["min_p"],
            num_top_N=tensors["num_top"],
        ),
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


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    dtype = np.int64 if array.dtype.kind == "i" else array.dtype
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device)
