"""What the first tensor-parallel rank tells the others, in order, as MessagePack by msgspec.

It alone schedules. The others do what it does: map images of their own, load adapters into the same
pages, and run the same steps. What a step draws they learn from its collectives.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from lorry.worker.messages import ImageReady, Message
from lorry.worker.step_work import StepWork


class MapImage(Message, frozen=True):
    image: ImageReady  # of the rank that is told


class UnmapImage(Message, frozen=True):
    version: bytes


class LoadAdapter(Message, frozen=True):
    """Copy a mapped image into pages of the pool."""

    version: bytes
    slot: int
    pages: list[int]


class FinishLoads(Message, frozen=True):
    """Steps from here on may use the oldest adapters that are being loaded."""

    count: int


class RunStep(Message, frozen=True):
    work: StepWork


class EndRank(Message, frozen=True):
    """Nothing comes after it."""


RankMessage = MapImage | UnmapImage | LoadAdapter | FinishLoads | RunStep | EndRank


class RankCodec:
    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_from_array)
        self._decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(
            RankMessage, dec_hook=_to_array
        )

    def encode(self, message: RankMessage) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> RankMessage:
        return self._decoder.decode(data)


def _from_array(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()


def _to_array(expected: Callable[..., Any], fields: Any) -> np.ndarray:
    assert expected is np.ndarray
    dtype, shape, data = fields
    return np.frombuffer(bytearray(data), dtype=dtype).reshape(shape)  # torch wants it writable
