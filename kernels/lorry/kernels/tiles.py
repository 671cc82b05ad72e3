"""Row tiles: the rows of a step cut into short runs that share a sequence or an adapter.

The references compute tile by tile in one batched operation, as the kernels do block by block, so
that a step costs the same number of operations whatever its number of requests and adapters.

Shape suffixes: T = rows of the step, N = tiles, M = rows of a tile.
"""

from typing import NamedTuple

import numpy as np
import torch


class RowTiles(NamedTuple):
    """Tiles of M rows; `row_NM` holds row numbers, T where a tile is not full."""

    owner_N: torch.Tensor  # int64, what all rows of a tile share
    row_NM: torch.Tensor  # int64

    def to(self, device: torch.device) -> "RowTiles":
        return RowTiles(self.owner_N.to(device), self.row_NM.to(device))


def cut_tiles(
    owner: np.ndarray, start: np.ndarray, length: np.ndarray, *, tile_rows: int, num_rows: int
) -> RowTiles:
    """Cut runs of rows (first row and length of each, int arrays) into tiles of `tile_rows`."""
    tiles_per_run = -(-length // tile_rows)
    run = np.repeat(np.arange(len(owner)), tiles_per_run)
    first_tile = np.cumsum(tiles_per_run) - tiles_per_run
    offset = (np.arange(len(run)) - first_tile[run]) * tile_rows
    row = offset[:, None] + np.arange(tile_rows)
    row = np.where(row < length[run][:, None], row + start[run][:, None], num_rows)
    return RowTiles(
        torch.from_numpy(owner[run].astype(np.int64)), torch.from_numpy(row.astype(np.int64))
    )


def gather_rows(x_TX: torch.Tensor, row_NM: torch.Tensor) -> torch.Tensor:
    """Rows of each tile, [N, M, ...]; what stands for a missing row is arbitrary."""
    return x_TX[row_NM.clamp(max=x_TX.shape[0] - 1)]


def scatter_rows(out_TX: torch.Tensor, row_NM: torch.Tensor, values_NMX: torch.Tensor) -> None:
    """Write the rows of each tile into `out_TX`, missing rows nowhere."""
    present = row_NM < out_TX.shape[0]
    out_TX[row_NM[present]] = values_NMX[present]


def scatter_add_rows(out_TX: torch.Tensor, row_NM: torch.Tensor, values_NMX: torch.Tensor) -> None:
    """Add the rows of each tile to `out_TX`; a row is in one tile at most."""
    present = row_NM < out_TX.shape[0]
    out_TX.index_add_(0, row_NM[present], values_NMX[present].to(out_TX.dtype))
