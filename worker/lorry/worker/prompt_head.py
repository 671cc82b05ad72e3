"""Logprobs of prompts' tokens: the model's head over prompt rows, a piece at a time.

A piece bounds the logits, however many rows of a step are asked for. All is at fixed addresses, so
that a piece can be captured. Shape suffixes: T = rows of the step, P = rows of a piece, H = hidden
size, V = vocabulary, Y = packed logprobs of a row.
"""

from collections.abc import Callable

import numpy as np
import torch

from lorry.kernels.logprobs import NOT_ASKED, packed_logprobs, rank, unpacked, write_logprobs
from lorry.worker.device_vocabulary import DeviceVocabulary
from lorry.worker.prompt_rows import PromptTargets
from lorry.worker.step_head import Head
from lorry.worker.transfers import to_device, to_host

PIECE_ROWS = 64


def piece_rows(max_rows: int) -> int:
    return min(PIECE_ROWS, max_rows)


class PromptHead:
    """Reads the hidden states of a step that was just run."""

    def __init__(self, model: Head, hidden_TH: torch.Tensor, vocabulary: DeviceVocabulary) -> None:
        device, rows = hidden_TH.device, piece_rows(len(hidden_TH))
        self._model = model
        self._hidden_TH = hidden_TH
        self._vocabulary = vocabulary
        self._targets_3P = torch.zeros(len(PromptTargets._fields), rows, dtype=torch.int64).to(
            device
        )
        self._logprobs_PY = packed_logprobs(rows, device)

    def run(self) -> None:
        """One piece."""
        step_row_P, token_id_P, num_top_P = self._targets_3P
        num_top_P = num_top_P.int()
        logits_PV = self._vocabulary.whole(self._model.logits(self._hidden_TH[step_row_P]))
        ranked = rank(logits_PV, num_top_P)
        write_logprobs(logits_PV, ranked, token_id_P, num_top_P, unpacked(self._logprobs_PY))

    def launch(self, targets: PromptTargets, run_piece: Callable[[], None]) -> torch.Tensor:
        """Packed logprobs of all rows in host memory, once the current stream has come there."""
        piece, count = self._targets_3P.shape[1], len(targets.step_row_P)
        padded = np.zeros((len(targets), -(-count // piece) * piece), dtype=np.int64)
        padded[-1] = NOT_ASKED
        for row, values in zip(padded, targets, strict=True):
            row[:count] = values
        inputs = to_device(padded, self._hidden_TH.device)
        outputs = []
        for targets_3P in inputs.split(piece, dim=1):
            self._targets_3P.copy_(targets_3P)
            run_piece()
            outputs.append(self._logprobs_PY.clone())
        return to_host(torch.cat(outputs)[:count])
