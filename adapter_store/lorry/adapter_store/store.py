"""The store: what its three services share, and the work between requests."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lorry.adapter_store import edits
from lorry.adapter_store.backend import Backend, Loaded
from lorry.adapter_store.builders import Builders
from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.config_checks import ConfigChecks
from lorry.adapter_store.contents import Contents
from lorry.adapter_store.counts import FetchCounts
from lorry.adapter_store.follower import Follower
from lorry.adapter_store.image_key import ImageKey
from lorry.adapter_store.images import ImageTier
from lorry.adapter_store.leases import Lease
from lorry.adapter_store.limits import Limits
from lorry.adapter_store.memory_file import MemoryFile
from lorry.adapter_store.pace import Pace
from lorry.adapter_store.publisher import Publisher
from lorry.adapter_store.ram_budget import ram_budget
from lorry.adapter_store.records import Adapter, UploadRecord
from lorry.adapter_store.storage import Storage
from lorry.adapter_store.upload import Upload
from lorry.adapter_store.uploads import Uploads
from lorry.adapter_store.warmer import Warmer
from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout
from lorry.rpc.errors import StoreUnavailable
from lorry.rpc.labels import check_labels
from lorry.rpc.names import AdapterName
from lorry.rpc.repeated_log import RepeatedLog
from lorry.rpc.shared_directory import SharedDirectory
from lorry.rpc.shared_memory import shm_namespace_id

SWEEP_PERIOD_S = 5.0
CHECK_NICENESS = 10  # uploads leave the CPU to fetches, and neither waits for the other

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a store is told beside where its adapters are."""

    geometry: ModelGeometry
    dtype: Dtype  # in which the values of uploads must be finite
    limits: Limits
    shm_dir: Path
    ram_bytes: int | None  # of page images; None: as `ram_budget` has it
    builder_processes: int
    memory_dir: Path | None = None  # None: nothing is remembered from one life to the next
    now_ns: Callable[[], int] = time.time_ns
    clock: Callable[[], float] = time.monotonic


class Store:
    """Owns all parts; made by `opened`."""

    def __init__(
        self,
        settings: Settings,
        loaded: Loaded,
        *,
        storage: Storage,
        shared: SharedDirectory,
        builders: Builders,  # of page images
        checkers: Builders,  # of uploads
    ) -> None:
        self.limits = settings.limits
        self.catalogue = Catalogue(storage, loaded)
        self.follower = Follower(self.catalogue)
        self.contents = Contents(storage, self.catalogue)
        budget_bytes = ram_budget(settings.shm_dir, settings.ram_bytes)
        self.images = ImageTier(
            shared, budget_bytes=budget_bytes, storage=storage, builders=builders
        )
        self.pace = Pace(settings.clock)
        self.config_checks = ConfigChecks(checkers, settings.limits)
        self._now_ns = settings.now_ns
        self.uploads = self._uploads(settings, storage, loaded, checkers)
        self.warmer = Warmer(
            MemoryFile(settings.memory_dir, settings.geometry),
            catalogue=self.catalogue,
            contents=self.contents,
            images=self.images,
        )
        self.fetches = FetchCounts()
        self.shm_namespace_id = shm_namespace_id(shared.path)
        self.draining = asyncio.Event()
        self._sweep_wanted = asyncio.Event()
        self._sweep_log = RepeatedLog(log)

    def _uploads(
        self, settings: Settings, storage: Storage, loaded: Loaded, checkers: Builders
    ) -> Uploads:
        publisher = Publisher(
            storage=storage,
            builders=checkers,
            catalogue=self.catalogue,
            contents=self.contents,
            limits=settings.limits,
            dtype=settings.dtype,
            now_ns=settings.now_ns,
        )
        return Uploads(
            storage=storage,
            publisher=publisher,
            catalogue=self.catalogue,
            limits=settings.limits,
            pace=self.pace,
            stored=loaded.uploads,
            now_ns=settings.now_ns,
            clock=settings.clock,
        )

    async def begin_upload(
        self,
        name: AdapterName,
        *,
        config_json: str,
        weights_bytes: int,
        weights_sha256: bytes,
        labels: dict[str, str],
        expected_etag: str,
    ) -> tuple[str, Upload]:
        """Validate what can be known before any weights travel, and reserve their place."""
        check_labels(labels)
        await self.catalogue.catch_up()
        edits.check_replaceable(self.catalogue.get(name), name, expected_etag)
        self.uploads.check_room(name, weights_bytes)
        record = UploadRecord(
            key="",
            name=name,
            spec=await self.config_checks.check(name.tenant, config_json),
            weights_bytes=weights_bytes,
            weights_sha256=weights_sha256,
            config_sha256=sha256(config_json.encode()).digest(),
            labels=labels,
            expected_etag=expected_etag,
            create_time_ns=self._now_ns(),
        )
        return await self.uploads.create(record)

    async def update(self, name: AdapterName, etag: str, new: edits.Update) -> tuple[Adapter, int]:
        """Change an adapter; returns it and the revision that shows it."""
        change = await self.catalogue.change(
            name, lambda before: edits.update(before, name, etag, new, self._now_ns())
        )
        assert change.adapter is not None
        return change.adapter, change.revision

    async def delete(self, name: AdapterName, etag: str, *, allow_missing: bool) -> int:
        """Remove a name; returns the revision that shows it."""

        def edit(before: Adapter | None) -> None:
            edits.delete(before, name, etag, allow_missing=allow_missing)

        change = await self.catalogue.change(name, edit)
        self._sweep_wanted.set()
        return change.revision

    async def lease(self, version: bytes, layout: PageLayout) -> Lease:
        """A lease of a version's image; the version itself is kept with it."""
        started_s = time.monotonic()
        self.contents.hold(version)
        self.pace.fetched()
        try:
            lease = await self.images.lease(version, layout)
        except BaseException:
            self.contents.release(version)
            raise
        self.fetches.lease_s.observe(time.monotonic() - started_s)
        self.warmer.wanted(ImageKey(version, layout))
        lease.then(lambda: self._lease_ended(version))
        return lease

    def _lease_ended(self, version: bytes) -> None:
        self.contents.release(version)
        if not self.contents.is_referenced(version):
            self._sweep_wanted.set()

    async def sweep(self) -> None:
        """Forget expired uploads and delete the contents and images that nothing refers to."""
        for version in self.images.versions:
            if not self.contents.is_referenced(version):
                await self.images.discard(version)
        await self.uploads.drop_expired()
        await self.contents.lease()
        await self.contents.drop_unreferenced()
        await self.warmer.keep_pins()
        await self.warmer.save_at_times()

    async def sweep_regularly(self) -> None:
        """Run for as long as the store does."""
        while True:
            # Not wait_for: before Python 3.12 it may swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_PERIOD_S):
                    await self._sweep_wanted.wait()
            self._sweep_wanted.clear()
            try:
                await self.sweep()
            except StoreUnavailable as error:
                self._sweep_log.failed(str(error), logging.WARNING, "sweeping failed: %s", error)
            except Exception as error:
                kind, message = repr(error), "sweeping failed; it is tried again"
                self._sweep_log.failed(kind, logging.ERROR, message, traceback_of=error)
            else:
                self._sweep_log.worked()

    async def start_draining(self) -> None:
        """End what would last: watches and leases."""
        self.draining.set()
        self.images.start_draining()
        await self.catalogue.close()

    async def close(self) -> None:
        try:
            await self.warmer.save()
        except StoreUnavailable as error:
            log.warning("what was wanted most since the last minute is forgotten: %s", error)
        await self.uploads.close()
        await self.catalogue.close()
        await self.images.close()


@contextlib.asynccontextmanager
async def opened(open_backend: Callable[[], Backend], settings: Settings) -> AsyncIterator[Store]:
    """A store that sweeps and builds ahead for as long as the block runs.

    Raises ValueError if `ram_bytes` is more than `shm_dir` can hold.
    """
    async with contextlib.AsyncExitStack() as stack:
        shared = SharedDirectory(settings.shm_dir)
        stack.callback(shared.close)
        storage = Storage(await asyncio.to_thread(open_backend))
        stack.callback(storage.close)
        loaded = await storage.run(storage.backend.load)
        geometry, processes = settings.geometry, settings.builder_processes
        builders = Builders(geometry, processes=processes)
        stack.push_async_callback(builders.close)
        checkers = Builders(geometry, processes=processes, niceness=CHECK_NICENESS)
        stack.push_async_callback(checkers.close)
        store = Store(
            settings,
            loaded,
            storage=storage,
            shared=shared,
            builders=builders,
            checkers=checkers,
        )
        async with _at_work(store, shared=storage.backend.shared):
            yield store


@contextlib.asynccontextmanager
async def _at_work(store: Store, *, shared: bool) -> AsyncIterator[None]:
    """What a store does by itself; on exit that ends, and then the store."""
    work = [store.sweep_regularly(), store.warmer.prefetch()]
    if shared:
        work.append(store.follower.run())
    background = [asyncio.create_task(each) for each in work]
    for task in background:
        task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        await store.start_draining()
        await store.close()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("work of the store's own ended early", exc_info=error)
