"""One upload.

RECEIVING ──> FINISHING ──> PUBLISHED
    ^             ├───────> FAILED
    └─────────────┘ (the store failed, not the upload: it may be tried again)
"""

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorry.adapter_store.records import Published, UploadRecord


class UploadState(enum.Enum):
    RECEIVING = "receiving"
    FINISHING = "finishing"
    PUBLISHED = "published"
    FAILED = "failed"


TRANSITIONS: Mapping[UploadState, frozenset[UploadState]] = {
    UploadState.RECEIVING: frozenset({UploadState.FINISHING}),
    UploadState.FINISHING: frozenset(
        {UploadState.PUBLISHED, UploadState.FAILED, UploadState.RECEIVING}
    ),
    UploadState.PUBLISHED: frozenset(),
    UploadState.FAILED: frozenset(),
}


@dataclass(eq=False, slots=True)
class Upload:
    record: UploadRecord
    active_s: float  # when it was last moved on, by the clock of `Uploads`
    received_bytes: int = 0
    state: UploadState = UploadState.RECEIVING
    finishing: "asyncio.Task[Published] | None" = None
    writer: object = None  # the stream that may append
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_open(self) -> bool:
        return self.state in (UploadState.RECEIVING, UploadState.FINISHING)

    @property
    def missing_bytes(self) -> int:
        return self.record.weights_bytes - self.received_bytes

    def move_to(self, state: UploadState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.record.name}: {self.state} to {state}"
        self.state = state
