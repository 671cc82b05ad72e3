"""A page image's states, and the leases that keep it.

BUILDING ──> READY ──> GONE
    └──────────────────^
"""

import asyncio
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lorry.adapter_store.image import ImageHeader
from lorry.adapter_store.image_key import ImageKey


class ImageState(enum.Enum):
    BUILDING = "building"
    READY = "ready"
    GONE = "gone"


TRANSITIONS: Mapping[ImageState, frozenset[ImageState]] = {
    ImageState.BUILDING: frozenset({ImageState.READY, ImageState.GONE}),
    ImageState.READY: frozenset({ImageState.GONE}),
    ImageState.GONE: frozenset(),
}


@dataclass(eq=False, slots=True)
class Image:
    key: ImageKey
    build: "asyncio.Task[None]"
    state: ImageState = ImageState.BUILDING
    header: ImageHeader | None = None  # set with READY
    path: Path | None = None  # set with READY
    num_waiting: int = 0  # callers that will lease it once it is built
    leases: "set[Lease]" = field(default_factory=set)

    @property
    def evictable(self) -> bool:
        return self.state is ImageState.READY and not self.leases and not self.num_waiting

    def ask_back(self) -> None:
        for lease in self.leases:
            lease.reclaimed.set()

    def move_to(self, state: ImageState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.key.file_name}: {self.state} to {state}"
        self.state = state


class Lease:
    """Keeps an image; its file is neither changed nor unlinked before `release`."""

    def __init__(self, image: Image, released: Callable[[Image], None]) -> None:
        assert image.header is not None
        assert image.path is not None
        self.header: ImageHeader = image.header
        self.path: Path = image.path
        self.reclaimed = asyncio.Event()  # set when the store needs the memory
        self._image = image
        self._after_release: list[Callable[[], None]] = [partial(released, image)]
        image.leases.add(self)

    @property
    def held(self) -> bool:
        return self in self._image.leases

    def then(self, action: Callable[[], None]) -> None:
        """Also do this once when the lease ends."""
        self._after_release.append(action)

    def release(self) -> None:
        """End the lease; does nothing the second time."""
        if self in self._image.leases:
            self._image.leases.remove(self)
            for action in self._after_release:
                action()
