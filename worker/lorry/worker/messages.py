"""Commands and events of the worker's front and engine, as MessagePack by msgspec.

The front speaks gRPC and fetches page images; the engine owns the GPU. Each sends lists of these
messages over a ring.
"""

from collections.abc import Sequence

import msgspec

from lorry.worker.commands import (
    Cancel,
    Command,
    EvictAdapter,
    Failure,
    ImageFailed,
    ImageFile,
    ImageModule,
    ImageReady,
    Message,
    PinAdapter,
    Prefetch,
    ReclaimImage,
    Stop,
    Submit,
    UnpinAdapter,
)
from lorry.worker.events import (
    NOT_ASKED,
    AdminResult,
    Event,
    Failed,
    FetchImage,
    Finished,
    FinishReason,
    PromptLogprobs,
    ReleaseImage,
    ResidencyChange,
    RowLogprobs,
    Started,
    Status,
    StepTokens,
    TokenLogprobs,
)

__all__ = [
    "NOT_ASKED",
    "AdminResult",
    "Cancel",
    "Codec",
    "Command",
    "Event",
    "EvictAdapter",
    "Failed",
    "Failure",
    "FetchImage",
    "FinishReason",
    "Finished",
    "ImageFailed",
    "ImageFile",
    "ImageModule",
    "ImageReady",
    "Message",
    "PinAdapter",
    "Prefetch",
    "PromptLogprobs",
    "ReclaimImage",
    "ReleaseImage",
    "ResidencyChange",
    "RowLogprobs",
    "Started",
    "Status",
    "StepTokens",
    "Stop",
    "Submit",
    "TokenLogprobs",
    "UnpinAdapter",
]


class Codec:
    """Encodes lists of messages; decodes what the other side sent."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._commands = msgspec.msgpack.Decoder(list[Command])
        self._events = msgspec.msgpack.Decoder(list[Event])

    def encode(self, messages: Sequence[Command] | Sequence[Event]) -> bytes:
        return self._encoder.encode(messages)

    def decode_commands(self, data: bytes) -> list[Command]:
        return self._commands.decode(data)

    def decode_events(self, data: bytes) -> list[Event]:
        return self._events.decode(data)
