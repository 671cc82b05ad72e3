"""Causal attention of a step's rows over the KV pages of their sequences.

Shape suffixes: T = rows of the step, Q = query heads, K = KV heads, D = head dimension,
G = query heads of a KV head, S = sequences, P = pages of a sequence, N = tiles, M = rows of a tile,
C = cached tokens.
"""

import math

import torch

from lorry.kernels.attention_kernel import attention_kernel
from lorry.kernels.attention_plan import AttentionWork
from lorry.kernels.dependent_launch import has_dependent_launch
from lorry.kernels.pool_view import PoolView
from lorry.kernels.tiles import RowTiles, gather_rows, scatter_rows

LOG2_E = 1.4426950408889634


def paged_attention_reference(
    q_TQD: torch.Tensor,
    pool: PoolView,
    layer: int,
    position_T: torch.Tensor,
    block_table_SP: torch.Tensor,
    tiles: RowTiles,
    window: int | None = None,
) -> torch.Tensor:
    """Return ``softmax(q k / sqrt(D)) v`` over tokens 0 to ``position_T[t]`` of row t's sequence.

    With a window, over the last `window` of these tokens. Every row stands in one tile; a tile's
    owner is its sequence, a row of `block_table_SP`.
    """
    k_NKCD, v_NKCD = _cached(pool, layer, block_table_SP[tiles.owner_N])
    is_row_NM = tiles.row_NM < q_TQD.shape[0]
    position_NM = gather_rows(position_T, tiles.row_NM).masked_fill(~is_row_NM, -1)
    cached_C = torch.arange(k_NKCD.shape[2], device=q_TQD.device)
    visible_NMC = cached_C <= position_NM[..., None]
    if window is not None:
        visible_NMC &= cached_C > position_NM[..., None] - window
    unread_NC = ~visible_NMC.any(dim=1)
    # Stale bytes of a page may be anything: 0 * NaN would carry them into the sum.
    v_NKCD = v_NKCD.masked_fill(unread_NC[:, None, :, None], 0)
    q_NKGMD = _grouped_by_kv_head(gather_rows(q_TQD, tiles.row_NM), k_NKCD.shape[1])
    score = (q_NKGMD @ k_NKCD[:, :, None].transpose(-1, -2)).float() / math.sqrt(q_TQD.shape[-1])
    score = score.masked_fill(~visible_NMC[:, None, None], -torch.inf)
    o_NKGMD = score.softmax(dim=-1).to(v_NKCD.dtype) @ v_NKCD[:, :, None]
    o_TQD = torch.empty_like(q_TQD)
    scatter_rows(o_TQD, tiles.row_NM, o_NKGMD.permute(0, 3, 1, 2, 4).flatten(2, 3))
    return o_TQD


def _cached(
    pool: PoolView, layer: int, table_NP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each tile's sequence, ``[N, K, C, D]``."""
    num_tiles, num_pages = table_NP.shape
    slices = pool.slices.index_select(0, (table_NP * pool.layers + layer).flatten())
    kv = slices.view(num_tiles, num_pages, *pool.kv_shape).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    return kv[0], kv[1]


def _grouped_by_kv_head(q_NMQD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    tiles, rows, heads, dim = q_NMQD.shape
    return q_NMQD.view(tiles, rows, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)


def paged_attention(
    q_TQD: torch.Tensor,
    pool: PoolView,
    layer: int,
    block_table_SP: torch.Tensor,
    work: AttentionWork,
    out_TQD: torch.Tensor,
) -> None:
    """Write ``softmax(q k / sqrt(D)) v`` of the rows that `work` was planned for into `out_TQD`.

    Another kernel than the plan's has to stand before this one, which reads the plan early. Other
    rows are left as they are. The unit strides of q, out and the block table are required.
    """
    layout = pool.layout
    setting = work.setting
    head_dim = layout.geometry.head_dim
    attention_kernel[(work.num_programs,)](
        q_TQD,
        pool.slices[layer:],
        block_table_SP,
        out_TQD,
        work.tile_N8,
        work.program_P4,
        work.share_1,
        work.partial_o,
        work.partial_ml,
        work.arrived_P,
        q_TQD.stride(0),
        q_TQD.stride(1),
        out_TQD.stride(0),
        out_TQD.stride(1),
        block_table_SP.stride(0),
        pool.layers * layout.slice_elements,
        LOG2_E / math.sqrt(head_dim),
        KV_HEADS=work.kv_heads,
        GROUP=work.group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=layout.page_tokens,
        WINDOW=work.window or 0,
        BLOCK_ROWS=setting.block_rows,
        BLOCK_TOKENS=setting.block_tokens,
        UNIT_COST=setting.unit_cost,
        PRECISION="ieee" if q_TQD.dtype == torch.float32 else "tf32",
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        maxnreg=setting.registers,
        launch_pdl=has_dependent_launch(q_TQD.device),
    )
