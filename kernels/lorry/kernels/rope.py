"""Rotary position embedding of queries and keys, and the write of keys and values into pages.

Shape suffixes: T = rows of the step, Q = query heads, K = KV heads, D = head dimension,
L = positions up to the longest context.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before
from lorry.kernels.norm import rms_norm_reference
from lorry.kernels.pool_view import PoolView

BLOCK_HEADS = 16


class QkNorm(NamedTuple):
    """RMS norm of each head of the queries and of the keys, before they are rotated."""

    q_D: torch.Tensor
    k_D: torch.Tensor
    epsilon: float


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
    norm: QkNorm | None = None,
) -> torch.Tensor:
    """Return rotated queries; write rotated keys and the values into ``pool``.

    Row t's token lies in page ``page_T[t]`` at ``position_T[t] % page tokens``.
    """
    if norm is not None:
        q_TQD = rms_norm_reference(q_TQD, norm.q_D, norm.epsilon)
        k_TKD = rms_norm_reference(k_TKD, norm.k_D, norm.epsilon)
    cos_TD, sin_TD = cos_sin_L2D[position_T].unbind(1)
    token_T = position_T % pool.layout.page_tokens
    kv = pool.slices.view(-1, *pool.kv_shape)
    slice_T = page_T * pool.layers + layer
    kv[slice_T, 0, :, token_T] = rope_reference(k_TKD, cos_TD, sin_TD)
    kv[slice_T, 1, :, token_T] = v_TKD
    return rope_reference(q_TQD, cos_TD, sin_TD)


def cos_sin_table(positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of every position in float32, ``[L, 2, D]``."""
    return cos_sin_of(positions, inverse_frequencies(head_dim, theta))


def inverse_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """Radians that each pair of dimensions turns from one position to the next, ``[D / 2]``."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


def cos_sin_of(positions: int, inverse: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of every position at the frequencies `inverse`, ``[L, 2, D]``."""
    angle = torch.outer(torch.arange(positions).float(), inverse)
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


@triton.jit
def _rope_write_kv_kernel(
    q_ptr,  # [T, Q, D], rotated in place
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    cos_sin_ptr,  # [L, 2, D], float32
    position_ptr,  # [T]
    page_ptr,  # [T]
    q_norm_ptr,  # [D]
    k_norm_ptr,  # [D]
    pool_ptr,  # [pages, K or V, K, page tokens, D] of one layer
    stride_qt,
    stride_kt,
    stride_vt,
    page_stride,
    epsilon,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """One program for each row and block of heads; the heads of q, k and v are one sequence."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    position = tl.load(position_ptr + row).to(tl.int64)
    page = tl.load(page_ptr + row).to(tl.int64)

    half = tl.arange(0, HEAD_DIM // 2)
    table = cos_sin_ptr + position * (2 * HEAD_DIM) + half
    cos_1 = tl.load(table)[None, :]
    cos_2 = tl.load(table + HEAD_DIM // 2)[None, :]
    sin_1 = tl.load(table + HEAD_DIM)[None, :]
    sin_2 = tl.load(table + HEAD_DIM + HEAD_DIM // 2)[None, :]

    is_q = (head < QUERY_HEADS)[:, None]
    q_ptrs = q_ptr + row * stride_qt + head[:, None] * HEAD_DIM + half[None, :]
    first, second = _load_halves(q_ptrs, is_q, HEAD_DIM)
    if HAS_NORM:
        first, second = _normed(first, second, q_norm_ptr + half, epsilon, q_ptr, HEAD_DIM)
    first, second = rotated(first, second, cos_1, sin_1, cos_2, sin_2)
    tl.store(q_ptrs, first.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q_ptrs + HEAD_DIM // 2, second.to(q_ptr.dtype.element_ty), mask=is_q)

    kv_head = head - QUERY_HEADS
    slot = page * page_stride + kv_head * (PAGE_TOKENS * HEAD_DIM)
    slot += position % PAGE_TOKENS * HEAD_DIM
    cached = pool_ptr + slot[:, None] + half[None, :]
    is_k = ((kv_head >= 0) & (kv_head < KV_HEADS))[:, None]
    k_ptrs = k_ptr + row * stride_kt + kv_head[:, None] * HEAD_DIM + half[None, :]
    first, second = _load_halves(k_ptrs, is_k, HEAD_DIM)
    if HAS_NORM:
        first, second = _normed(first, second, k_norm_ptr + half, epsilon, k_ptr, HEAD_DIM)
    first, second = rotated(first, second, cos_1, sin_1, cos_2, sin_2)
    tl.store(cached, first.to(pool_ptr.dtype.element_ty), mask=is_k)
    tl.store(cached + HEAD_DIM // 2, second.to(pool_ptr.dtype.element_ty), mask=is_k)

    # Values follow the keys in a slice just as their heads follow in this program's sequence.
    is_v = ((kv_head >= KV_HEADS) & (kv_head < 2 * KV_HEADS))[:, None]
    v_ptrs = v_ptr + row * stride_vt + (kv_head - KV_HEADS)[:, None] * HEAD_DIM + half[None, :]
    tl.store(cached, tl.load(v_ptrs, mask=is_v, other=0.0), mask=is_v)
    second = tl.load(v_ptrs + HEAD_DIM // 2, mask=is_v, other=0.0)
    tl.store(cached + HEAD_DIM // 2, second, mask=is_v)


@triton.jit
def _load_halves(x_ptrs, mask, HEAD_DIM: tl.constexpr):
    """Both halves of the heads in float32."""
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _normed(first, second, weight_ptrs, epsilon, x_ptr, HEAD_DIM: tl.constexpr):
    """Both halves of the normed heads, rounded as the type of `x_ptr` rounds them."""
    dtype = x_ptr.dtype.element_ty
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
    scale = tl.rsqrt(mean + epsilon)[:, None]
    weight_1 = tl.load(weight_ptrs).to(tl.float32)[None, :]
    weight_2 = tl.load(weight_ptrs + HEAD_DIM // 2).to(tl.float32)[None, :]
    first = weight_1 * (first * scale).to(dtype).to(tl.float32)
    second = weight_2 * (second * scale).to(dtype).to(tl.float32)
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def rotated(first, second, cos_1, sin_1, cos_2, sin_2):
    """Both halves of the rotated heads in float32."""
    return first * cos_1 - second * sin_1, second * cos_2 + first * sin_2


def rope_write_kv(
    q_TQD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_sin_L2D: torch.Tensor,
    position_T: torch.Tensor,
    page_T: torch.Tensor,
    pool: PoolView,
    layer: int,
    norm: QkNorm | None = None,
) -> None:
    """Rotate `q_TQD` in place, normed if asked; write such keys and the values into ``pool``.

    Row t's token lies in page ``page_T[t]`` at ``position_T[t] % page tokens``; padded rows name
    the dummy page. Heads of a row lie one after the other.
    """
    layout = pool.layout
    num_rows, query_heads, head_dim = q_TQD.shape
    kv_heads = layout.local_kv_heads
    heads = query_heads + 2 * kv_heads
    _rope_write_kv_kernel[(num_rows, triton.cdiv(heads, BLOCK_HEADS))](
        q_TQD,
        k_TKD,
        v_TKD,
        cos_sin_L2D,
        position_T,
        page_T,
        None if norm is None else norm.q_D,
        None if norm is None else norm.k_D,
        pool.slices[layer:],
        q_TQD.stride(0),
        k_TKD.stride(0),
        v_TKD.stride(0),
        pool.layers * layout.slice_elements,
        None if norm is None else norm.epsilon,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=layout.page_tokens,
        HAS_NORM=norm is not None,
        BLOCK_HEADS=BLOCK_HEADS,
        num_warps=4,
        launch_pdl=has_dependent_launch(q_TQD.device),
    )
