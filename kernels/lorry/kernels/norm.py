"""RMSNorm, with the residual addition that comes before it.

Shape suffixes: T = rows of the step, H = hidden size.
"""

import torch
import triton
import triton.language as tl

from lorry.kernels.dependent_launch import has_dependent_launch, wait_for_kernels_before

ELEMENTS_PER_WARP = 512  # of a row: two loads of 16 bytes a thread


def rms_norm_reference(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``, computed in float32."""
    x = x_TH.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_H * x.to(x_TH.dtype)


def add_rms_norm_reference(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of ``x + residual`` and that sum, the next residual."""
    total_TH = x_TH + residual_TH
    return rms_norm_reference(total_TH, weight_H, eps), total_TH


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H], read and replaced by the sum
    weight_ptr,  # [H]
    out_ptr,  # [T, H]
    stride_xt,
    stride_rt,
    stride_ot,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program for each row."""
    wait_for_kernels_before()
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    in_row = h < hidden
    x = tl.load(x_ptr + row * stride_xt + h, mask=in_row, other=0.0)
    weight = tl.load(weight_ptr + h, mask=in_row, other=0.0)
    if HAS_RESIDUAL:
        residuals = residual_ptr + row * stride_rt + h
        residual = tl.load(residuals, mask=in_row, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residuals, x, mask=in_row)
    exact = x.to(tl.float32)
    mean = tl.sum(exact * exact, 0) / hidden
    normed = (exact * tl.rsqrt(mean + eps)).to(x.dtype)
    out = (weight.to(tl.float32) * normed.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_ot + h, out, mask=in_row)


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_TH: torch.Tensor) -> None:
    """Write ``x / sqrt(mean(x^2) + eps) * weight`` into `out_TH`, which may be `x_TH`."""
    _launch(x_TH, None, weight_H, eps, out_TH)


def add_rms_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    out_TH: torch.Tensor,
) -> None:
    """Add `x_TH` to `residual_TH` in place and write the sum's norm into `out_TH`."""
    _launch(x_TH, residual_TH, weight_H, eps, out_TH)


def _launch(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    out_TH: torch.Tensor,
) -> None:
    num_rows, hidden = x_TH.shape
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(num_rows,)](
        x_TH,
        x_TH if residual_TH is None else residual_TH,
        weight_H,
        out_TH,
        x_TH.stride(0),
        0 if residual_TH is None else residual_TH.stride(0),
        out_TH.stride(0),
        hidden,
        eps,
        HAS_RESIDUAL=residual_TH is not None,
        BLOCK_H=block,
        num_warps=min(8, max(1, block // ELEMENTS_PER_WARP)),
        launch_pdl=has_dependent_launch(x_TH.device),
    )
