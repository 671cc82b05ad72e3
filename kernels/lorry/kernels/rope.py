"""Rotary position embedding of queries and keys, and the write of keys and values into pages.

Shape suffixes: T = rows of the step, Q = query heads, K = KV heads, D = head dimension,
L = positions up to the longest context.
"""

import torch

from lorry.kernels.pool_view import PoolView


def rope_reference(x_TXD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate each head's halves: ``x * cos + [-x2, x1] * sin``; X is any number of heads."""
    first, second = x_TXD.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_TXD * cos_TD[:, None] + turned * sin_TD[:, None]).to(x_TXD.dtype)


def rope_write_kv_reference(
    q_TQD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_sin_L2D: torch.Tensor,
    position_T: torch.Tensor,
    page_T: torch.Tensor,
    pool: PoolView,
    layer: int,
) -> torch.Tensor:
    """Return rotated queries; write rotated keys and the values into ``pool``.

    Row t's token lies in page ``page_T[t]`` at ``position_T[t] % page tokens``.
    """
    cos_TD, sin_TD = cos_sin_L2D[position_T].unbind(1)
    token_T = position_T % pool.layout.page_tokens
    kv = pool.slices.view(-1, *pool.kv_shape)
    slice_T = page_T * pool.layers + layer
    kv[slice_T, 0, :, token_T] = rope_reference(k_TKD, cos_TD, sin_TD)
    kv[slice_T, 1, :, token_T] = v_TKD
    return rope_reference(q_TQD, cos_TD, sin_TD)


def cos_sin_table(positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of every position in float32, ``[L, 2, D]``."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angle = torch.outer(torch.arange(positions).float(), inverse)
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=1)
