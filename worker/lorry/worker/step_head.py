"""What follows the layers of a step: the model's head, and the samples' draws and logprobs.

All is at fixed addresses, so that it can be captured. Shape suffixes: T = rows of the step,
N = rows that sample, R = rows of the sequence table, H = hidden size, V = vocabulary,
Y = packed logprobs of a row.
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from lorry.kernels.adjustments import adjust, count_drawn
from lorry.kernels.logprobs import packed_logprobs, rank, unpacked, write_logprobs
from lorry.kernels.sampling import sample
from lorry.kernels.truncation import truncate
from lorry.worker.device_vocabulary import DeviceVocabulary, Noise
from lorry.worker.sequence_adjustments import SequenceAdjustments
from lorry.worker.step_arrays import HeadKind


class Head(Protocol):
    def logits(self, x_NH: torch.Tensor) -> torch.Tensor: ...


class StepHead:
    """Draws from the hidden states of a step's samples; `buffers` are the step's fields."""

    def __init__(
        self,
        model: Head,
        buffers: Mapping[str, torch.Tensor],
        hidden_TH: torch.Tensor,
        adjustments: SequenceAdjustments,
        vocabulary: DeviceVocabulary,
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
        self._adjustments = adjustments
        self._vocabulary = vocabulary

    def run(self, samples: int, kind: HeadKind) -> None:
        """Fill the first rows of `token_N`, and those of `logprobs_NY` whose samples ask."""
        buffers = {name: buffer[:samples] for name, buffer in self._buffers.items()}
        token_N = self.token_N[:samples]
        logits_NV = self._model.logits(self._hidden_TH[buffers["sample_row"]])
        if kind is HeadKind.PLAIN:
            self._vocabulary.draw(logits_NV, _noise(buffers), token_N)
        else:
            logits_NV = self._vocabulary.whole(logits_NV)
            self._draw_any(logits_NV, kind, buffers, token_N)
            self._report(logits_NV, buffers["num_top"], token_N)
        self.last_token_R[buffers["state_row"]] = token_N

    def _draw_any(
        self,
        logits_NV: torch.Tensor,
        kind: HeadKind,
        buffers: Mapping[str, torch.Tensor],
        token_N: torch.Tensor,
    ) -> None:
        if kind is HeadKind.FULL:
            self._draw_kept(logits_NV, buffers, token_N)
        else:
            tables = self._adjustments.tables
            rows = self._adjustments.of(buffers["state_row"])
            self._draw_kept(adjust(logits_NV, tables, rows), buffers, token_N)
            count_drawn(tables, rows, token_N)

    def _draw_kept(
        self, logits_NV: torch.Tensor, buffers: Mapping[str, torch.Tensor], token_N: torch.Tensor
    ) -> None:
        parameters = (buffers[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        threshold_N = truncate(logits_NV, *parameters)
        sample(logits_NV, *_noise(buffers), token_N, threshold_N)

    def _report(
        self, logits_NV: torch.Tensor, num_top_N: torch.Tensor, token_N: torch.Tensor
    ) -> None:
        """Logprobs of the model's own logits."""
        out = unpacked(self.logprobs_NY[: len(logits_NV)])
        write_logprobs(logits_NV, rank(logits_NV, num_top_N), token_N, num_top_N, out)


def _noise(buffers: Mapping[str, torch.Tensor]) -> Noise:
    return Noise(buffers["temperature"], buffers["seed"], buffers["output_position"])
