"""Heads of q, k and v that a program has in registers, on their way to where they are read.

Parts of the kernel of `lora_expand_rope`. Shape suffixes as in `rope`.
"""

import triton
import triton.language as tl

from lorry.kernels.rope import rotated


@triton.jit
def load_angles(cos_sin_ptr, position, is_row, HEAD_DIM: tl.constexpr):
    """Cosines and sines at the rows' positions, ``[rows, 1, D/2]``; a head's halves share them."""
    half = tl.arange(0, HEAD_DIM // 2)[None, None, :]
    table = cos_sin_ptr + position.to(tl.int64)[:, None, None] * (2 * HEAD_DIM) + half
    mask = is_row[:, None, None]
    cos = tl.load(table, mask=mask, other=0.0)
    sin = tl.load(table + HEAD_DIM, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def write_heads(
    total,  # [ROWS, COLUMNS] or of as many elements: heads of a module
    angles,
    out_ptr,  # the module's first head in the first row
    pool_ptr,
    position,
    kv_page,
    is_row,
    module,
    first_head,
    module_heads,
    stride_ot,
    page_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write queries where they came from, rotated; keys, rotated, and values into pages."""
    halves = tl.reshape(total, (ROWS, COLUMNS // HEAD_DIM, 2, HEAD_DIM // 2))
    first, second = tl.split(tl.permute(halves, (0, 1, 3, 2)))
    cos, sin = angles
    turned = rotated(first.to(tl.float32), second.to(tl.float32), cos, sin, cos, sin)
    first = tl.where(module == 2, first, turned[0].to(first.dtype))
    second = tl.where(module == 2, second, turned[1].to(first.dtype))

    head = first_head + tl.arange(0, COLUMNS // HEAD_DIM)
    half = tl.arange(0, HEAD_DIM // 2)[None, None, :]
    mask = is_row[:, None, None] & (head < module_heads)[None, :, None]
    if module == 0:
        t = tl.arange(0, ROWS)
        outs = out_ptr + t[:, None, None] * stride_ot + head[None, :, None] * HEAD_DIM + half
        tl.store(outs, first, mask=mask)
        tl.store(outs + HEAD_DIM // 2, second, mask=mask)
    else:
        # Values follow the keys in a slice.
        kv_head = head + (module - 1) * KV_HEADS
        token = kv_page.to(tl.int64) * page_stride + position % PAGE_TOKENS * HEAD_DIM
        in_token = kv_head[None, :, None] * (PAGE_TOKENS * HEAD_DIM) + half
        cached = pool_ptr + token[:, None, None] + in_token
        tl.store(cached, first, mask=mask)
        tl.store(cached + HEAD_DIM // 2, second, mask=mask)
