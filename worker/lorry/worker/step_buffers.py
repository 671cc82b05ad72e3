"""A step's metadata on the GPU, at fixed addresses, written by one packed copy.

Shape suffixes: T = rows of the step, N = rows that sample, U = new pages of sequences.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from lorry.kernels.page_layout import BASE_MODEL
from lorry.worker.messages import NOT_ASKED
from lorry.worker.pool import DUMMY_PAGE

NO_SEQUENCE = -1
SLOTS = 3  # host copies: one per step in flight and one to fill


class Field(NamedTuple):
    dtype: np.dtype
    per: str  # T, N or U


# 8-byte fields first, so that every field is aligned. Kernels read int32, torch indexes by int64.
FIELDS: Mapping[str, Field] = {
    "token_id": Field(np.dtype(np.int64), "T"),  # or -1 - row of the sequence that drew it
    "sample_row": Field(np.dtype(np.int64), "N"),
    "state_row": Field(np.dtype(np.int64), "N"),
    "seed": Field(np.dtype(np.int64), "N"),
    "page_place": Field(np.dtype(np.int64), "U"),
    "position": Field(np.dtype(np.int32), "T"),
    "page": Field(np.dtype(np.int32), "T"),
    "sequence": Field(np.dtype(np.int32), "T"),
    "slot": Field(np.dtype(np.int32), "T"),
    "output_position": Field(np.dtype(np.int32), "N"),
    "temperature": Field(np.dtype(np.float32), "N"),
    "top_k": Field(np.dtype(np.int32), "N"),
    "top_p": Field(np.dtype(np.float32), "N"),
    "min_p": Field(np.dtype(np.float32), "N"),
    "num_top": Field(np.dtype(np.int32), "N"),
    "new_page": Field(np.dtype(np.int32), "U"),
}
PADDING = {
    "page": DUMMY_PAGE,
    "sequence": NO_SEQUENCE,
    "slot": BASE_MODEL,
    "num_top": NOT_ASKED,
}


class StepBuffers:
    """Device tensors by field name, and pinned host copies that take turns."""

    def __init__(
        self, *, max_rows: int, max_samples: int, max_new_pages: int, device: torch.device
    ) -> None:
        self._length = {"T": max_rows, "N": max_samples, "U": max_new_pages}
        self._dummy_row = max_samples
        num_bytes = sum(self._length[field.per] * field.dtype.itemsize for field in FIELDS.values())
        self._device_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.device = self._views(self._device_bytes)
        self._host_bytes = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)
        ]
        self._host = [
            {name: view.numpy() for name, view in self._views(buffer).items()}
            for buffer in self._host_bytes
        ]
        self._copied = [torch.cuda.Event() for _ in range(SLOTS)]
        self._turn = 0

    def fill(
        self, values: Mapping[str, np.ndarray], *, padded_rows: int, padded_samples: int
    ) -> None:
        """Copy a step's fields to the device, in the order of the current stream.

        Rows up to `padded_rows` and samples up to `padded_samples` are filled with what harms
        nobody: the dummy page, no sequence, the base model, a row of state that nobody has,
        greedy draws that ask for nothing.
        """
        self._turn = (self._turn + 1) % SLOTS
        self._copied[self._turn].synchronize()
        ends = {"T": padded_rows, "N": padded_samples, "U": 0}
        for name, host in self._host[self._turn].items():
            value = values[name]
            host[: len(value)] = value
            padding = self._dummy_row if name == "state_row" else PADDING.get(name, 0)
            host[len(value) : ends[FIELDS[name].per]] = padding
        self._device_bytes.copy_(self._host_bytes[self._turn], non_blocking=True)
        self._copied[self._turn].record()

    def _views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        views, start = dict[str, torch.Tensor](), 0
        for name, field in FIELDS.items():
            end = start + self._length[field.per] * field.dtype.itemsize
            dtype = torch.from_numpy(np.empty(0, dtype=field.dtype)).dtype
            views[name] = buffer[start:end].view(dtype)
            start = end
        return views
