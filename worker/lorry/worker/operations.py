"""What a model needs of its backend in one step; torch on any device, Triton on a GPU.

Shape suffixes: T = rows of the step, H = hidden size, I = input width, O = output width of a group,
Q = query heads, K = KV heads, D = head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Projection(NamedTuple):
    """Base weight of a group's modules, one below the other."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None = None


class Product(Protocol):
    """A linear layer."""

    def __call__(
        self,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        /,
        onto_TO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x weight^T + bias``, ``[T, O]``; added to `onto` in place, if that is given."""
        ...


class HeadNorms(NamedTuple):
    """Weights of the RMS norms of each head of q and k."""

    q_D: torch.Tensor
    k_D: torch.Tensor


class Operations(Protocol):
    """The operations of one step, which know its rows, sequences and adapters."""

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        """The norm of `x`, which is kept."""
        ...

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x + residual`` and that sum; neither argument may be used again."""
        ...

    def project_qkv(
        self, x_TI: torch.Tensor, base: Projection, norms: HeadNorms | None, layer: int
    ) -> torch.Tensor:
        """Rotated queries, ``[T, Q, D]``; rotated keys and the values go to the pool.

        Projected as `project` does. With norms, those of the queries and keys are rotated.
        """
        ...

    def attention(self, q_TQD: torch.Tensor, layer: int) -> torch.Tensor:
        """Each row's mix of its sequence's values up to its position, ``[T, Q, D]``.

        Of as many as the layer's window holds.
        """
        ...

    def project(
        self,
        x_TI: torch.Tensor,
        base: Projection,
        group: int,
        layer: int,
        onto_TO: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        """``x weight^T + bias`` and each row's adapter, for each module of ``GROUPS[group]``.

        Those of a single module are added to `onto` in place, if that is given.
        """
        ...

    def swiglu(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor: ...
