"""What follows the layers of a step: the model's head, and the samples' draws and logprobs.

All is at fixed addresses, so that it can be captured. Shape suffixes: T = rows of the step,
N = rows that sample, R = rows of the sequence table, H = hidden size, V = vocabulary,
X = stop tokens, Y = packed logprobs of a row.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from lorry.kernels.logprobs import packed_logprobs, rank, unpacked, write_logprobs
from lorry.kernels.sampling import sample
from lorry.kernels.truncation import truncate
from lorry.worker.sequences import NO_TOKEN
from lorry.worker.step_arrays import HeadKind

MAX_STOP_IDS = 80  # the protocol allows 64 beside the model's end-of-sequence tokens


class Head(Protocol):
    def logits(self, x_NH: torch.Tensor) -> torch.Tensor: ...


class StepHead:
    """Draws from the hidden states of a step's samples; `buffers` are the step's fields."""

    def __init__(
        self,
        model: Head,
        buffers: Mapping[str, torch.Tensor],
        hidden_TH: torch.Tensor,
        *,
        max_samples: int,
    ) -> None:
        device = hidden_TH.device
        # The last row of state belongs to nobody; padded samples write there.
        self.last_token_R = torch.zeros(max_samples + 1, dtype=torch.int64, device=device)
        self.token_N = torch.zeros(max_samples, dtype=torch.int64, device=device)
        self.logprobs_NY = packed_logprobs(max_samples, device)
        self._model = model
        self._buffers = buffers
        self._hidden_TH = hidden_TH
        self._banned_NX = torch.full(
            (max_samples, MAX_STOP_IDS), NO_TOKEN, dtype=torch.int64, device=device
        )
        self._has_banned = False

    def set_banned(self, banned_NX: np.ndarray | None) -> None:
        """Token ids that the next step's samples must not draw; NO_TOKEN where there is none."""
        if banned_NX is not None or self._has_banned:
            self._banned_NX.fill_(NO_TOKEN)
        if banned_NX is not None:
            samples, width = banned_NX.shape
            ids = torch.from_numpy(banned_NX.astype(np.int64)).pin_memory()
            self._banned_NX[:samples, :width].copy_(ids, non_blocking=True)
        self._has_banned = banned_NX is not None

    def run(self, samples: int, kind: HeadKind) -> None:
        """Fill the first rows of `token_N`, and those of `logprobs_NY` whose samples ask."""
        buffers = {name: buffer[:samples] for name, buffer in self._buffers.items()}
        token_N = self.token_N[:samples]
        logits_NV = self._model.logits(self._hidden_TH[buffers["sample_row"]])
        if kind is HeadKind.PLAIN:
            self._ban(logits_NV)
            self._draw(logits_NV, None, buffers, token_N)
        else:
            ranked = rank(logits_NV, buffers["num_top"])  # raw, with what is banned
            self._ban(logits_NV)
            parameters = (buffers[name] for name in ("temperature", "top_k", "top_p", "min_p"))
            self._draw(logits_NV, truncate(logits_NV, *parameters), buffers, token_N)
            out = unpacked(self.logprobs_NY[:samples])
            write_logprobs(logits_NV, ranked, token_N, buffers["num_top"], out)
        self.last_token_R[buffers["state_row"]] = token_N

    def _ban(self, logits_NV: torch.Tensor) -> None:
        banned_NX = self._banned_NX[: len(logits_NV)]
        penalty_NX = torch.where(banned_NX >= 0, -torch.inf, 0.0).to(logits_NV.dtype)
        logits_NV.scatter_add_(1, banned_NX.clamp(min=0), penalty_NX)

    def _draw(
        self,
        logits_NV: torch.Tensor,
        threshold_N: torch.Tensor | None,
        buffers: Mapping[str, torch.Tensor],
        token_N: torch.Tensor,
    ) -> None:
        sample(
            logits_NV,
            buffers["temperature"],
            buffers["seed"],
            buffers["output_position"],
            token_N,
            threshold_N,
        )
