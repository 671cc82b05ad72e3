"""Copies to the GPU from memory that it cannot read itself, through pinned parts."""

import torch

PART_BYTES = 4 << 20
PARTS = 16


class Staging:
    """Pinned parts that take turns: the host fills one while the GPU reads others."""

    def __init__(self, part_bytes: int = PART_BYTES, parts: int = PARTS) -> None:
        self._parts = [
            torch.empty(part_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(parts)
        ]
        self._read = [torch.cuda.Event(blocking=True) for _ in range(parts)]
        self._turn = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue a copy of bytes on the current stream; `source` may change once this returns."""
        part_bytes = len(self._parts[0])
        for bytes_, place in zip(source.split(part_bytes), target.split(part_bytes), strict=True):
            self._read[self._turn].synchronize()
            part = self._parts[self._turn][: len(bytes_)]
            part.copy_(bytes_)
            place.copy_(part, non_blocking=True)
            self._read[self._turn].record()
            self._turn = (self._turn + 1) % len(self._parts)
