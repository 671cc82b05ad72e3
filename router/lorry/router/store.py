"""The link to the adapter store: it keeps the catalogue's copy and asks for what is not in it."""

import asyncio
import functools
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from lorry.router.catalogue import AdapterVersion, Catalogue, Change
from lorry.rpc.backoff import Backoff
from lorry.rpc.errors import AdapterNotFound, LorryError, RevisionCompacted, StoreUnavailable
from lorry.rpc.names import AdapterName
from lorry.rpc.repeated_log import RepeatedLog
from lorry.rpc.status import from_rpc
from lorry.v1 import adapter_service_pb2 as adapter_pb
from lorry.v1 import catalogue_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub
from lorry.v1.catalogue_service_pb2_grpc import CatalogueServiceStub

log = logging.getLogger(__name__)


class Store:
    """`watch` runs as long as the router; `resolve` answers at any time."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        silence_s: float,
        timeout_s: float,
        on_synced: Callable[[], None],
    ) -> None:
        self._catalogue_service = CatalogueServiceStub(channel)
        self._adapter_service = AdapterServiceStub(channel)
        self._silence_s = silence_s
        self._timeout_s = timeout_s
        self._on_synced = on_synced
        self._catalogue = Catalogue()
        self._watching = False  # whether changes arrive as they happen
        self._watch_log, self._ask_log = RepeatedLog(log), RepeatedLog(log)
        self._asked: dict[AdapterName, asyncio.Task[AdapterVersion]] = {}

    @property
    def num_adapters(self) -> int:
        """Of the copy of the catalogue."""
        return len(self._catalogue)

    @property
    def watching(self) -> bool:
        """Whether changes of the catalogue arrive as they happen."""
        return self._watching

    async def resolve(self, name: AdapterName) -> AdapterVersion:
        """The version that `name` stands for now; AdapterNotFound, or StoreUnavailable if unsure.

        A name that the copy does not know may be new, so the store is asked once; so it is while
        the watch is broken, and then the copy counts if the store does not answer.
        """
        known = self._catalogue.get(name)
        if known is not None and self._watching:
            return known
        try:
            return await self._ask(name)
        except StoreUnavailable:
            if known is not None:
                return known
            raise

    async def watch(self) -> None:
        """Keep the copy up to date until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._watch_once(backoff)
            except RevisionCompacted:
                log.info("the store cannot continue from the last revision: reading everything")
                self._catalogue.forget_revision()
            except (LorryError, TimeoutError) as error:
                why, message = str(error) or "silence", "the watch of the catalogue broke: %s"
                self._watch_log.failed(why, logging.WARNING, message, why)
            finally:
                self._watching = False
            await backoff.wait()

    async def _watch_once(self, backoff: Backoff) -> None:
        request = pb.WatchCatalogueRequest(
            store_id=self._catalogue.store_id, start_revision=self._catalogue.begin()
        )
        call = self._catalogue_service.WatchCatalogue(request)
        try:
            async with asyncio.timeout(self._silence_s) as silence:
                async for response in call:
                    silence.reschedule(asyncio.get_running_loop().time() + self._silence_s)
                    self._apply(response)
                    backoff.reset()
        except grpc.aio.AioRpcError as failure:
            raise from_rpc(failure) from failure
        finally:
            call.cancel()
        raise StoreUnavailable("the store ended the watch")

    def _apply(self, response: pb.WatchCatalogueResponse) -> None:
        self._catalogue.apply(
            map(_change, response.events),
            store_id=response.store_id,
            revision=response.revision,
            complete=response.snapshot_complete,
        )
        if response.snapshot_complete and not self._watching:
            self._watching = True
            self._watch_log.worked()
            log.info(
                "the catalogue holds %d adapters at revision %d",
                len(self._catalogue),
                response.revision,
            )
            self._on_synced()

    async def _ask(self, name: AdapterName) -> AdapterVersion:
        """Ask the store, once for all requests that want the name at the same time."""
        task = self._asked.get(name)
        if task is None:
            task = self._asked[name] = asyncio.create_task(self._get_adapter(name))
            task.add_done_callback(functools.partial(self._answered, name))
        return await asyncio.shield(task)

    def _answered(self, name: AdapterName, task: asyncio.Task[AdapterVersion]) -> None:
        del self._asked[name]
        if not task.cancelled():
            task.exception()  # seen, also where every client that wanted to know has left

    async def _get_adapter(self, name: AdapterName) -> AdapterVersion:
        request = adapter_pb.GetAdapterRequest(name=str(name))
        try:
            response = await self._adapter_service.GetAdapter(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc(failure)
            if isinstance(error, AdapterNotFound):
                raise adapter_not_found(name) from error
            message = "the store did not answer about %s: %s"
            self._ask_log.failed(error.reason, logging.WARNING, message, name, error)
            raise StoreUnavailable(
                f"the store cannot be asked about {name}", retry_after_s=1.0, adapter=str(name)
            ) from error
        self._ask_log.worked()
        return _published(response.adapter)


def adapter_not_found(name: AdapterName) -> AdapterNotFound:
    """The same words for an unknown adapter and for another tenant's."""
    return AdapterNotFound(f"adapter {name} is not registered", adapter=str(name))


def _change(event: pb.AdapterEvent) -> Change:
    name = AdapterName.parse(event.adapter.name, tenant="")
    gone = event.type == pb.AdapterEvent.TYPE_DELETED
    return Change(name, None if gone else _published(event.adapter))


def _published(adapter: adapter_pb.Adapter) -> AdapterVersion:
    return AdapterVersion(
        adapter.version, adapter.published.max_rank, adapter.published.weights_bytes
    )
