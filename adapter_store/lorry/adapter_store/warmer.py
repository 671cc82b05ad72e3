"""Builds page images that nobody asks for now: what was wanted most, and what is pinned."""

import asyncio
import logging
import time

from lorry.adapter_store import edits
from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.contents import Contents
from lorry.adapter_store.image_key import ImageKey
from lorry.adapter_store.images import ImageTier
from lorry.adapter_store.memory_file import Memory, MemoryFile
from lorry.adapter_store.pins import Pins
from lorry.adapter_store.popularity import Popularity
from lorry.kernels.page_layout import PageLayout
from lorry.rpc.errors import LorryError, StoreFull
from lorry.rpc.names import AdapterName
from lorry.rpc.repeated_log import RepeatedLog

PREFETCH_SHARE = 0.9  # of the budget; beyond it one image would evict another
LAYOUTS_OF_A_PIN = 4
SAVE_PERIOD_S = 60.0

log = logging.getLogger(__name__)


class Warmer:
    """Owns the pins and the popularity of images, and the file in which they outlive the store."""

    def __init__(
        self, file: MemoryFile, *, catalogue: Catalogue, contents: Contents, images: ImageTier
    ) -> None:
        memory = file.read()
        self.pins = Pins(memory.pins, catalogue)
        self._popularity = Popularity(memory.wanted)
        self._file, self._catalogue = file, catalogue
        self._contents = contents
        self.images = images
        self._one_at_a_time = asyncio.Lock()
        self._tried: set[ImageKey] = set()
        self._saved_s = time.monotonic()
        self._failures = RepeatedLog(log)
        images.pinned = self.pins.versions

    def wanted(self, key: ImageKey) -> None:
        """A worker has asked for this image."""
        self._popularity.record(key)

    async def prefetch(self) -> None:
        """Build the most wanted images, the pinned ones first, until the memory is almost full."""
        await self.keep_pins()
        limit_bytes = PREFETCH_SHARE * self.images.budget_bytes
        for key in self._popularity.snapshot():
            if self.images.used_bytes >= limit_bytes:
                return
            await self._try_build(key)

    async def keep_pins(self) -> None:
        """Build what pinned names publish and memory lacks, once: others may need the room more."""
        layouts = self._layouts()
        keys = {ImageKey(version, layout) for version in self.pins.versions() for layout in layouts}
        for key in keys - self._tried:
            await self._try_build(key)
        self._tried = keys

    async def pin(self, name: AdapterName) -> None:
        """Raises AdapterNotFound, or StoreFull or StoreUnavailable, and then it is not pinned."""
        if self._catalogue.get(name) is None:
            raise edits.not_found(name)
        was_pinned = name in set(self.pins)
        self.pins.add(name)
        try:
            await self._build_pinned(name)
            await self.save()
        except BaseException:
            if not was_pinned:
                self.pins.discard(name)
            raise

    async def unpin(self, name: AdapterName) -> None:
        self.pins.discard(name)
        await self.save()

    async def save(self) -> None:
        """Write down pins and popularity."""
        self._saved_s = time.monotonic()
        memory = Memory(tuple(self.pins), self._popularity.snapshot())
        async with self._one_at_a_time:
            await asyncio.to_thread(self._file.write, memory)

    async def save_at_times(self) -> None:
        """`save` if the last time is `SAVE_PERIOD_S` ago."""
        if time.monotonic() >= self._saved_s + SAVE_PERIOD_S:
            await self.save()

    async def _build_pinned(self, name: AdapterName) -> None:
        version = self.pins.version(name)
        assert version is not None
        for layout in self._layouts():
            await self._build(ImageKey(version, layout))
        if version in self.images.unprotected():
            raise StoreFull(
                f"the images of all pins would take more than half of the store's budget "
                f"(--ram-bytes) of {self.images.budget_bytes} bytes"
            )

    async def _try_build(self, key: ImageKey) -> None:
        """What fails here is built, or fails, when somebody wants it."""
        try:
            await self._build(key)
        except LorryError as error:
            self._failures.failed(str(error), logging.WARNING, "not built ahead: %s", error)

    async def _build(self, key: ImageKey) -> None:
        self._contents.hold(key.version)
        try:
            await self.images.build_ahead(key)
        finally:
            self._contents.release(key.version)

    def _layouts(self) -> list[PageLayout]:
        """Of the most wanted images: those that workers use."""
        layouts = {key.layout: None for key in self._popularity.snapshot()}
        return list(layouts)[:LAYOUTS_OF_A_PIN]
