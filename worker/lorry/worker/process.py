"""The life of the worker's front process: start the engine, serve, drain, stop."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence

import grpc.aio

from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.call_counts import CallCounts, call_metrics
from lorry.rpc.channel import open_channel
from lorry.rpc.heap import keep_freed_memory
from lorry.rpc.metrics import TableCollector, registry_of
from lorry.rpc.metrics_server import serving_metrics
from lorry.rpc.server import Server, serving, stop_requested
from lorry.rpc.shared_directory import SharedDirectory
from lorry.rpc.tls import ServerTls
from lorry.v1.worker_admin_service_pb2_grpc import add_WorkerAdminServiceServicer_to_server
from lorry.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from lorry.worker.config import Config
from lorry.worker.engine_client import ENGINE_COMMAND, EngineClient
from lorry.worker.front import Front
from lorry.worker.image_header import ImageFormat
from lorry.worker.image_source import ImageSource
from lorry.worker.images import ImageFetcher
from lorry.worker.messages import Command
from lorry.worker.metrics import METRICS, Source, engine_process_collector
from lorry.worker.service import SERVICES, Identity, WorkerAdminServicer, WorkerServicer

HEARTBEAT_S = 1.0
READY_SILENCE_S = 5.0  # of the engine, after which this worker is not ready
CLOSE_S = 1.0  # for routers to read how their streams ended

log = logging.getLogger(__name__)


def run(config: Config, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until SIGTERM or SIGINT; returns 0, or 1 if the engine was lost."""
    keep_freed_memory()
    return asyncio.run(_run(config, engine_command))


async def _run(config: Config, engine_command: Sequence[str]) -> int:
    stop = asyncio.create_task(stop_requested())  # also while the model loads
    tls = config.server_tls()
    base_model = read_base_model(config.model)
    engine_config = config.engine(base_model)
    engine = EngineClient(
        engine_config,
        command=engine_command,
        start_timeout_s=config.start_timeout_s,
        silence_s=config.engine_silence_s,
    )
    async with contextlib.AsyncExitStack() as stack:
        images = await stack.enter_async_context(_fetching(config, base_model, engine.send))
        window = engine_config.max_running + config.max_waiting
        front = Front(engine.send, images, window=window)
        calls = CallCounts()
        registry = registry_of(
            TableCollector(METRICS, Source(front, images, engine)),
            TableCollector(call_metrics("lorry_worker"), calls),
            engine_process_collector(lambda: engine.pid),
        )
        await stack.enter_async_context(serving_metrics(config.scraped_address, registry, tls))
        await stack.enter_async_context(engine.running(front.handle))
        server = await stack.enter_async_context(_serving(config, tls, base_model, front, calls))
        server.announce("worker")
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(_beat(front, engine, server))
            exit_code = await _serve(config, front, engine, server, stop)
            beating.cancel()
        return exit_code


async def _serve(
    config: Config, front: Front, engine: EngineClient, server: Server, stop: "asyncio.Task[None]"
) -> int:
    """Wait for the signal and drain; 0, or 1 as soon as the engine is lost."""
    lost = asyncio.create_task(engine.lost())
    await asyncio.wait({stop, lost}, return_when=asyncio.FIRST_COMPLETED)
    if not lost.done():
        log.info("draining for at most %.0f s", config.grace_s)
        await server.start_draining()
        draining = asyncio.create_task(front.drain(config.grace_s))
        await asyncio.wait({draining, lost}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
    if lost.done():
        log.error("%s", lost.result())
        front.lose_engine("see the worker's log")
        return 1
    lost.cancel()
    front.end_streams()
    return 0


async def _beat(front: Front, engine: EngineClient, server: Server) -> None:
    """Tell routers and probes how this worker is."""
    await front.started.wait()
    while True:
        await server.set_ready(not front.draining and engine.silent_s < READY_SILENCE_S)
        front.beat()
        await asyncio.sleep(HEARTBEAT_S)


@contextlib.asynccontextmanager
async def _fetching(
    config: Config, base_model: BaseModel, send: Callable[[Command], None]
) -> AsyncIterator[ImageFetcher]:
    """Page images from the adapter store; on exit every lease and file is given back."""
    formats = [
        ImageFormat(layout=layout, model_digest=base_model.digest, max_rank=config.max_rank)
        for layout in config.page_layouts(base_model)
    ]
    with contextlib.closing(SharedDirectory(config.local_dir)) as local:
        async with open_channel(config.store, config.credentials()) as channel:
            source = ImageSource(channel, formats, shm_dir=config.shm_dir, local=local)
            fetcher = ImageFetcher(
                source,
                channel,
                send,
                max_fetches=config.max_fetches,
                timeout_s=config.fetch_timeout_s,
                copied_bytes=config.copied_image_bytes,
            )
            try:
                yield fetcher
            finally:
                await fetcher.close()


def _serving(
    config: Config,
    tls: ServerTls | None,
    base_model: BaseModel,
    front: Front,
    calls: CallCounts,
) -> contextlib.AbstractAsyncContextManager[Server]:
    identity = Identity(
        worker_id=config.worker_id, epoch=secrets.randbits(64), base_model=base_model
    )

    def register(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(WorkerServicer(front, identity), server)
        add_WorkerAdminServiceServicer_to_server(WorkerAdminServicer(front), server)

    return serving(
        register,
        services=SERVICES,
        address=config.address,
        authenticator=config.authenticator(),
        insecure=config.insecure,
        tls=tls,
        health_address=config.health_address,
        grace_s=CLOSE_S,
        calls=calls,
    )
