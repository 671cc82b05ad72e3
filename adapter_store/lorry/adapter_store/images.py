"""The RAM tier: page images in shared memory, built once, kept while leased, evicted by age."""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lorry.adapter_store.builders import Builders
from lorry.adapter_store.counts import ImageCounts
from lorry.adapter_store.image import image_bytes, image_header
from lorry.adapter_store.image_key import ImageKey
from lorry.adapter_store.leases import Image, ImageState, Lease
from lorry.adapter_store.records import Content
from lorry.adapter_store.storage import Storage, read_ahead
from lorry.adapter_store.tasks import Tasks
from lorry.kernels.page_layout import PageLayout
from lorry.rpc.errors import DigestMismatch, StoreFull
from lorry.rpc.shared_directory import SharedDirectory

RECLAIM_WAIT_S = 6.0  # readers have 5 s to end their leases
PINNED_SHARE = 0.5  # of the budget: what is pinned beyond it is evicted like everything else
ASK_AGAIN_S = 0.5  # so long a reader may keep what it was given while others wait for room


class ImageTier:
    """Owns the images and their byte budget."""

    def __init__(
        self, directory: SharedDirectory, *, budget_bytes: int, storage: Storage, builders: Builders
    ) -> None:
        self.counts = ImageCounts()
        self.pinned: Callable[[], frozenset[bytes]] = frozenset  # versions; set by who knows
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._storage = storage
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
    def versions(self) -> set[bytes]:
        """Of which there are images."""
        return {key.version for key in self._images}

    @property
    def num_images(self) -> int:
        """Of those that are built."""
        return sum(image.state is ImageState.READY for image in self._images.values())

    @property
    def num_leases(self) -> int:
        return sum(len(image.leases) for image in self._images.values())

    async def lease(self, version: bytes, layout: PageLayout) -> Lease:
        """A lease of the image, built if need be. Raises StoreFull."""
        key = ImageKey(version, layout)
        image = self._images.get(key)
        state = "absent" if image is None else image.state.value
        self.counts.wanted[state,] += 1
        if image is None:
            image = self._images[key] = Image(key, self._tasks.start(self._build(key)))
        image.num_waiting += 1
        try:
            await asyncio.shield(image.build)
        finally:
            image.num_waiting -= 1
        lease = Lease(image, self._after_release)
        self.counts.wanted_bytes[state,] += lease.header.image_bytes
        return lease

    async def build_ahead(self, key: ImageKey) -> None:
        """Have an image before somebody asks for it; the first to go again if nobody does.

        Raises StoreFull.
        """
        if key in self._images:
            return
        image = self._images[key] = Image(key, self._tasks.start(self._build(key)))
        self._images.move_to_end(key, last=False)
        await asyncio.shield(image.build)
        self.counts.built_ahead += 1

    def resident(self, version: bytes) -> list[int]:
        """Bytes of each of a version's images in memory."""
        return [
            image.header.image_bytes
            for image in self._images.values()
            if image.key.version == version and image.header is not None
        ]

    def unprotected(self) -> frozenset[bytes]:
        """The pinned versions that have images beyond the share of pins."""
        pinned, protected = self.pinned(), self._protected()
        return frozenset(
            image.key.version
            for image in self._images.values()
            if image.key.version in pinned and image not in protected
        )

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
            reading = self._storage.backend.weights(key.version)
            async with (
                self._storage.entered(reading) as (content, weights),
                self._tasks.beside(self._storage.run(read_ahead, weights)),
            ):
                self.counts.read_s.observe(time.monotonic() - started_s)
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
        try:
            checksum = await self._builders.build(
                temporary,
                weights=weights,
                crc32c=content.file_crc32c,
                spec=content.spec,
                layout=key.layout,
            )
        except DigestMismatch:
            await self._storage.run(self._storage.backend.quarantine, key.version)
            raise DigestMismatch.of_version(key.version) from None
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
        protected = self._protected()
        victim = next(
            (i for i in self._images.values() if i.evictable and i not in protected), None
        )
        if victim is not None:
            await self._evict(victim)
            self.counts.evictions += 1
            return
        for image in self._images.values():
            if image in protected or image.header is None:
                continue
            if missing_bytes > 0 and image.leases:
                missing_bytes -= image.header.image_bytes
                image.ask_back()
        self._room_made.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_AGAIN_S):
                await self._room_made.wait()

    def _protected(self) -> set[Image]:
        """The images of pins, the most recently used first, as far as their share goes."""
        pinned, share_bytes = self.pinned(), PINNED_SHARE * self._budget_bytes
        protected = set()
        for image in reversed(self._images.values()) if pinned else ():
            if image.key.version in pinned and image.header is not None:
                share_bytes -= image.header.image_bytes
                if share_bytes >= 0:
                    protected.add(image)
        return protected

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
