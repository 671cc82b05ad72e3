"""The RAM tier: page images in shared memory, built once, kept while leased, evicted by age of use.

BUILDING ──> READY ──> GONE
    └──────────────────^
"""

import asyncio
import contextlib
import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.builders import Builders
from lorry.adapter_store.counts import ImageCounts
from lorry.adapter_store.image import ImageHeader, image_bytes, image_header
from lorry.adapter_store.records import Content
from lorry.adapter_store.tasks import InThread, Tasks
from lorry.kernels.page_layout import PageLayout
from lorry.rpc.errors import LayoutUnsupported, StoreFull
from lorry.rpc.shared_directory import SharedDirectory

RECLAIM_WAIT_S = 6.0  # readers have 5 s to end their leases
ASK_AGAIN_S = 0.5  # so long a reader may keep what it was given while others wait for room


class ImageState(enum.Enum):
    BUILDING = "building"
    READY = "ready"
    GONE = "gone"


TRANSITIONS: Mapping[ImageState, frozenset[ImageState]] = {
    ImageState.BUILDING: frozenset({ImageState.READY, ImageState.GONE}),
    ImageState.READY: frozenset({ImageState.GONE}),
    ImageState.GONE: frozenset(),
}


class ImageKey(NamedTuple):
    version: bytes
    layout: PageLayout

    @property
    def file_name(self) -> str:
        return f"{self.version.hex()}.{sha256(repr(self.layout).encode()).hexdigest()[:16]}"


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

    def then(self, action: Callable[[], None]) -> None:
        """Also do this once when the lease ends."""
        self._after_release.append(action)

    def release(self) -> None:
        """End the lease; does nothing the second time."""
        if self in self._image.leases:
            self._image.leases.remove(self)
            for action in self._after_release:
                action()


class ImageTier:
    """Owns the images and their byte budget."""

    def __init__(
        self, directory: SharedDirectory, *, budget_bytes: int, backend: Backend, builders: Builders
    ) -> None:
        self.counts = ImageCounts()
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._backend = backend
        self._builders = builders
        self._images: OrderedDict[ImageKey, Image] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._one_at_a_time = asyncio.Lock()  # making room
        self._room_made = asyncio.Event()  # set by each release
        self._tasks = Tasks()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @property
    def num_images(self) -> int:
        """Of those that are built."""
        return sum(image.state is ImageState.READY for image in self._images.values())

    @property
    def num_leases(self) -> int:
        return sum(len(image.leases) for image in self._images.values())

    async def lease(self, version: bytes, layout: PageLayout) -> Lease:
        """A lease of the image, built if need be. Raises StoreFull or LayoutUnsupported."""
        if layout.tp_size != 1:
            raise LayoutUnsupported(f"layout.tp_size must be 1, got {layout.tp_size}")
        key = ImageKey(version, layout)
        image = self._images.get(key)
        self.counts.wanted["absent" if image is None else image.state.value,] += 1
        if image is None:
            image = self._images[key] = Image(key, self._tasks.start(self._build(key)))
        image.num_waiting += 1
        try:
            await asyncio.shield(image.build)
        finally:
            image.num_waiting -= 1
        return Lease(image, self._after_release)

    async def discard(self, version: bytes) -> None:
        """Remove the images of a version that nothing refers to."""
        for image in [i for i in self._images.values() if i.key.version == version]:
            if image.evictable:
                await self._evict(image)

    def check_integrity(self) -> None:
        """Assert that the budget counts exactly the images there are."""
        held = sum(i.header.image_bytes for i in self._images.values() if i.header is not None)
        building = any(i.state is ImageState.BUILDING for i in self._images.values())
        assert building or held == self._used_bytes, f"{held} held, {self._used_bytes} counted"
        for image in self._images.values():
            assert image.state is not ImageState.GONE
            assert image.path is None or image.path.stat().st_mode & 0o777 == 0o440

    def start_draining(self) -> None:
        """Ask for all leases back."""
        for image in self._images.values():
            image.ask_back()

    async def close(self) -> None:
        """Wait for the builds under way."""
        await self._tasks.close()

    async def _build(self, key: ImageKey) -> None:
        """Reads, reserves, packs and publishes; on failure everything is given back."""
        started_s = time.monotonic()
        try:
            async with InThread(self._backend.weights(key.version)) as (content, weights):
                num_bytes = image_bytes(content.spec, key.layout)
                temporary = await self._reserve(num_bytes)
                try:
                    path, checksum = await self._pack(key, content, weights, temporary)
                except BaseException:
                    self._directory.remove(temporary)
                    self._give_back(num_bytes)
                    raise
        except BaseException:
            self._images.pop(key).move_to(ImageState.GONE)
            self.counts.failed_builds += 1
            raise
        image = self._images[key]
        image.header, image.path = image_header(content.spec, key.layout, checksum), path
        image.move_to(ImageState.READY)
        self.counts.build_s.observe(time.monotonic() - started_s)
        self.counts.built_bytes += image.header.image_bytes

    async def _pack(
        self, key: ImageKey, content: Content, weights: Path, temporary: Path
    ) -> tuple[Path, int]:
        checksum = await self._builders.build(
            temporary,
            weights=weights,
            crc32c=content.file_crc32c,
            spec=content.spec,
            layout=key.layout,
        )
        return self._directory.publish(temporary, key.file_name), checksum

    async def _reserve(self, num_bytes: int) -> Path:
        """A file for an image, its bytes counted, once there is room; raises StoreFull.

        The memory may be short before the budget is: the directory is not the store's alone.
        """
        if num_bytes > self._budget_bytes:
            raise StoreFull(
                f"an image of {num_bytes} bytes exceeds the store's budget (--ram-bytes) of "
                f"{self._budget_bytes}",
                imageBytes=num_bytes,
                budgetBytes=self._budget_bytes,
            )
        full = StoreFull(
            f"no room for an image of {num_bytes} bytes: all others are in use",
            retry_after_s=RECLAIM_WAIT_S,
            imageBytes=num_bytes,
        )
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + RECLAIM_WAIT_S
        async with self._one_at_a_time:
            while True:
                missing_bytes = self._used_bytes + num_bytes - self._budget_bytes
                if missing_bytes <= 0:
                    try:
                        return await self._allocate(num_bytes)
                    except StoreFull as error:
                        full, missing_bytes = error, num_bytes
                if loop.time() >= deadline_s:
                    raise full
                await self._make_room(missing_bytes)

    async def _allocate(self, num_bytes: int) -> Path:
        path = await asyncio.to_thread(self._directory.create, num_bytes)
        self._used_bytes += num_bytes
        return path

    async def _make_room(self, missing_bytes: int) -> None:
        """Evict one image, or ask for leases back and wait a while for the end of one.

        Images that were still being built are leased meanwhile, so the caller asks again.
        """
        victim = next((image for image in self._images.values() if image.evictable), None)
        if victim is not None:
            await self._evict(victim)
            self.counts.evictions += 1
            return
        for image in self._images.values():
            if missing_bytes > 0 and image.leases and image.header is not None:
                missing_bytes -= image.header.image_bytes
                image.ask_back()
        self._room_made.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_AGAIN_S):
                await self._room_made.wait()

    async def _evict(self, image: Image) -> None:
        """Once awaited it is gone before anybody else can lease or evict it."""
        assert image.evictable
        assert image.header is not None
        assert image.path is not None
        image.move_to(ImageState.GONE)
        del self._images[image.key]
        withdrawn = self._directory.withdraw(image.path)
        await self._tasks.finish(self._remove(withdrawn, image.header.image_bytes))

    async def _remove(self, path: Path, num_bytes: int) -> None:
        await asyncio.to_thread(self._directory.remove, path)
        self._give_back(num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self._used_bytes -= num_bytes
        self._room_made.set()

    def _after_release(self, image: Image) -> None:
        self._images.move_to_end(image.key)
        self._room_made.set()
