"""Copies page images to the GPU on a stream of their own, while steps go on.

The copy stream waits, on the device, for the last launched step before it writes a page, since
that step may still read what the page held. A file is registered for DMA, where the driver allows,
when it is loaded from again; what is loaded once is staged, since registering is a long call into
the driver. `benchmarks/copies.py` measures both.
"""

import logging
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from lorry.kernels.page_layout import BASE_MODEL
from lorry.kernels.pool_view import PoolView
from lorry.worker.adapter_memory import FinishedLoad
from lorry.worker.adapter_tables import TableBuffer, TableChange
from lorry.worker.host_images import HostImages
from lorry.worker.lora_groups import LoraGroups
from lorry.worker.messages import ImageReady
from lorry.worker.residency import Adapter
from lorry.worker.staging import Staging

REGISTER_READ_ONLY = 0x08  # cudaHostRegisterReadOnly
REGISTERED_FROM_LOAD = 2
NEVER = 0

log = logging.getLogger(__name__)


class _Copy(NamedTuple):
    num_bytes: int
    change: TableChange
    started: torch.cuda.Event
    done: torch.cuda.Event


class CudaAdapterMemory:
    """See `RankAdapterMemory`. A thread enqueues copies; pages are written on the copy stream."""

    def __init__(
        self, pool: PoolView, *, max_rank: int, registered_from_load: int = REGISTERED_FROM_LOAD
    ) -> None:
        device = pool.slices.device
        self.pool = pool
        self._table_buffer = TableBuffer(
            pool.layout, num_slots=pool.num_pages - 1, max_rank=max_rank, device=device
        )
        self.tables = self._table_buffer.tables
        self._pages = pool.slices.view(torch.uint8).view(-1, pool.layout.page_bytes)
        self._changes_all_S = np.zeros(pool.num_pages - 1, dtype=np.bool_)  # beyond attention
        self._images = HostImages()
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="adapter-copies",
            initializer=torch.cuda.set_device,
            initargs=(device,),
        )
        self._copies: deque[tuple[Adapter, Future[_Copy]]] = deque()
        self._registered: dict[int, torch.Tensor] = {}  # files by address
        self._loads: dict[int, int] = {}  # from each file, until it is registered
        self._registered_from_load = registered_from_load
        self._runtime: Any = torch.cuda.cudart()
        self._staging = Staging()
        weakref.finalize(self, _unregister_all, self._registered, self._runtime)

    def map(self, image: ImageReady) -> None:
        self._images.map(image)

    def unmap(self, version: bytes) -> None:
        data = self._images.unmap(version)
        if data is not None:
            self._thread.submit(self._unregister, data)

    def begin_load(self, adapter: Adapter) -> None:
        launched = torch.cuda.Event()
        launched.record()
        image = self._images.bytes_of(adapter.version)
        file = self._images.file_of(adapter.version)
        copy = self._thread.submit(self._copy, adapter, image, file, launched)
        self._copies.append((adapter, copy))

    def finished_loads(self) -> list[FinishedLoad]:
        count = 0
        for _, future in self._copies:
            if not (future.done() and future.result().done.query()):
                break
            count += 1
        return self._finish(count)

    def finish_loads(self, count: int) -> None:
        for _, future in islice(self._copies, count):
            future.result().done.synchronize()
        self._finish(count)

    def _finish(self, count: int) -> list[FinishedLoad]:
        """Note the oldest `count` copies, which are done."""
        finished, changes = [], []
        for _ in range(count):
            adapter, future = self._copies.popleft()
            copy = future.result()
            changes.append(copy.change)
            self._note_groups(adapter)
            seconds = max(copy.started.elapsed_time(copy.done) / 1e3, 1e-9)
            finished.append(FinishedLoad(adapter, copy.num_bytes, seconds))
        if changes:
            self._table_buffer.write(changes)
        return finished

    def groups_of(self, slot_T: np.ndarray) -> LoraGroups:
        """What the adapters in these slots change together."""
        slots = slot_T[slot_T != BASE_MODEL]
        if not len(slots):
            return LoraGroups.NONE
        return LoraGroups.ALL if self._changes_all_S[slots].any() else LoraGroups.ATTENTION

    def _note_groups(self, adapter: Adapter) -> None:
        assert adapter.image is not None
        groups = LoraGroups.of(module.name for module in adapter.image.modules)
        self._changes_all_S[adapter.slot] = groups is LoraGroups.ALL

    def _copy(
        self, adapter: Adapter, image: torch.Tensor, file: torch.Tensor, launched: torch.cuda.Event
    ) -> _Copy:
        """Runs in the thread: enqueue the copies of one image."""
        started, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        change = self._table_buffer.change(adapter)
        source = image.view(len(adapter.pages), -1)
        is_registered = self._register(file)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(launched)
            started.record()
            runs = list(_runs(adapter.pages))
            targets = [self._pages[page : page + count] for _, count, page in runs]
            parts = source.split([count for _, count, _ in runs])
            if is_registered:
                # One call: between calls the thread would wait for Python's lock. It is in torch's
                # stubs but not in its list of exports.
                copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
                copy_all(targets, parts, non_blocking=True)
            else:
                for target, part in zip(targets, parts, strict=True):
                    self._staging.copy(part.view(-1), target.view(-1))
            done.record()
        return _Copy(len(image), change, started, done)

    def _register(self, file: torch.Tensor) -> bool:
        """Whether the GPU can read the file's mapping; registers what is loaded from often."""
        address = file.data_ptr()
        if address in self._registered:
            return True
        loads = self._loads[address] = self._loads.get(address, 0) + 1
        if self._registered_from_load == NEVER or loads < self._registered_from_load:
            return False
        started_s = time.monotonic()
        error = int(self._runtime.cudaHostRegister(address, len(file), REGISTER_READ_ONLY))
        if error:
            log.warning("the driver does not map files (error %d): adapters are staged", error)
            self._registered_from_load = NEVER
            return False
        self._registered[address] = file
        log.debug("registered %d bytes in %.3f s", len(file), time.monotonic() - started_s)
        return True

    def _unregister(self, file: torch.Tensor) -> None:
        address = file.data_ptr()
        self._loads.pop(address, None)
        if self._registered.pop(address, None) is not None:
            self._runtime.cudaHostUnregister(address)


def _unregister_all(registered: dict[int, torch.Tensor], runtime: Any) -> None:
    """Before the files are unmapped: the driver would keep what lay at their addresses."""
    for address in registered:
        runtime.cudaHostUnregister(address)


def _runs(pages: list[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive pages: index of the first, how many, and its page."""
    first = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield first, index - first, pages[first]
            first = index
