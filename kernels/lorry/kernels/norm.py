"""RMSNorm, with the residual addition that comes before it.

Shape suffixes: T = rows of the step, H = hidden size.
"""

import torch


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
