"""What attention computes of one block of cached tokens, and of two parts of a row's tokens.

Scores are in base 2. A part of a row's tokens is told by the maximum of their scores, the sum of
their weights beside it, and the sum of their weighted values.
"""

import triton
import triton.language as tl

NOTHING_SEEN = tl.constexpr(-1e30)  # a finite maximum: the difference of two infinities is NaN


@triton.jit
def attend_block(
    q,
    m,
    total,
    acc,
    block,
    pool_ptr,
    block_table_ptr,
    position,
    num_tokens,
    page_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum and weighted values with those of one more block."""
    d = tl.arange(0, HEAD_DIM)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_cached = token < num_tokens  # beyond lie stale bytes, which may be anything
    page = tl.load(block_table_ptr + token // PAGE_TOKENS, mask=is_cached, other=0)
    offset = page.to(tl.int64) * page_stride + token % PAGE_TOKENS * HEAD_DIM
    k_ptr = pool_ptr + offset[:, None] + d[None, :]
    k = tl.load(k_ptr, mask=is_cached[:, None], other=0.0)
    v_ptr = k_ptr + KV_HEADS * PAGE_TOKENS * HEAD_DIM
    v = tl.load(v_ptr, mask=is_cached[:, None], other=0.0)

    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    is_seen = _is_seen(token[None, :], position[:, None], WINDOW)
    score = tl.where(is_seen, score, -float("inf"))
    new_m = tl.maximum(m, tl.max(score, 1))
    weight = tl.exp2(score - new_m[:, None])
    keep = tl.exp2(m - new_m)
    total = total * keep + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_m, total, acc


@triton.jit
def _is_seen(token, position, WINDOW: tl.constexpr):
    """Whether a row at `position` attends to `token`, which is one comparison in a window, too."""
    if WINDOW:
        return (position - token).to(tl.uint32) < WINDOW
    return token <= position


@triton.jit
def merge_part(m, total, acc, part_m, part_total, part_o):
    """Maximum, sum and weighted values with those of one more part."""
    new_m = tl.maximum(m, part_m)
    weight = tl.exp2(part_m - new_m)
    keep = tl.exp2(m - new_m)
    total = total * keep + weight * part_total
    acc = acc * keep[:, None] + weight[:, None] * part_o
    return new_m, total, acc


@triton.jit
def merge_parts(m, total, acc, part_m, part_total, part_o):
    """Maximum, sum and weighted values with those of more parts, which are axis 1."""
    new_m = tl.maximum(m, tl.max(part_m, 1))
    weight = tl.exp2(part_m - new_m[:, None])
    keep = tl.exp2(m - new_m)
    total = total * keep + tl.sum(weight * part_total, 1)
    acc = acc * keep[:, None] + tl.sum(weight[:, :, None] * part_o, 1)
    return new_m, total, acc
