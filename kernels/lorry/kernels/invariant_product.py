"""The base model's matrix products, batch-invariant: a row's result does not depend on the others.

A library takes other tiles, and sums in another order, for another number of rows. Here a product
of one width has one tile, whose sum goes over the input's width in one order.

Shape suffixes: T = rows of the step, I = input width, O = output width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductSetting:
    """Launch setting of a product."""

    block_rows: int
    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int


# One kernel for any number of rows, with the same instructions.
@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr,  # [T, I]
    weight_ptr,  # [O, I]
    bias_ptr,  # [O], or unused
    out_ptr,  # [T, O], read too where it is added to
    stride_xt,
    stride_wo,
    stride_ot,
    num_rows,
    outputs,
    inputs,
    HAS_BIAS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for each tile of the output; those of the same weights run side by side."""
    wait_for_kernels_before()
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_block = tl.arange(0, BLOCK_I)
    is_row = (t < num_rows)[:, None]
    is_output = (o < outputs)[:, None]
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * stride_xt + in_block[None, :]
    weight_ptrs = weight_ptr + o.to(tl.int64)[:, None] * stride_wo + in_block[None, :]

    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        in_row = (start + in_block < inputs)[None, :]
        x = tl.load(x_ptrs + start, mask=is_row & in_row, other=0.0)
        weight = tl.load(weight_ptrs + start, mask=is_output & in_row, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + t.to(tl.int64)[:, None] * stride_ot + o[None, :]
    is_mine = is_row & (o < outputs)[None, :]
    if IS_ADDED:
        acc += tl.load(out_ptrs, mask=is_mine, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_mine)


def invariant_product(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    setting: ProductSetting,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x weight^T + bias``, ``[T, O]``; the reference is ``torch.nn.functional.linear``.

    Added to `onto_TO` in place, if that is given.
    """
    (num_rows, inputs), outputs = x_TI.shape, weight_OI.shape[0]
    out_TO = x_TI.new_empty(num_rows, outputs) if onto_TO is None else onto_TO
    grid = (
        triton.cdiv(num_rows, setting.block_rows),
        triton.cdiv(outputs, setting.block_outputs),
    )
    _product_kernel[grid](
        x_TI,
        weight_OI,
        bias_O,
        out_TO,
        x_TI.stride(0),
        weight_OI.stride(0),
        out_TO.stride(0),
        num_rows,
        outputs,
        inputs,
        HAS_BIAS=bias_O is not None,
        IS_ADDED=onto_TO is not None,
        BLOCK_T=setting.block_rows,
        BLOCK_O=setting.block_outputs,
        BLOCK_I=setting.block_inputs,
        PRECISION="ieee" if x_TI.dtype == torch.float32 else "tf32",
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        launch_pdl=has_dependent_launch(x_TI.device),
    )
    return out_TO
