"""``python -m lorry.adapter_store``: run an adapter store."""

import asyncio
import logging
from functools import partial

from lorry.rpc.command import extra, run_service

with extra("adapter-store"):
    from prometheus_client import CollectorRegistry

    from lorry.adapter_store.backend import Backend
    from lorry.adapter_store.config import Config
    from lorry.adapter_store.hub import Hub
    from lorry.adapter_store.imports import importing
    from lorry.adapter_store.metrics import METRICS
    from lorry.adapter_store.service import SERVICES, register
    from lorry.adapter_store.store import Settings, Store, opened
    from lorry.rpc.call_counts import CallCounts, call_metrics
    from lorry.rpc.metrics import TableCollector, registry_of
    from lorry.rpc.metrics_server import serving_metrics
    from lorry.rpc.server import serving, stop_requested
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.channel import MIB
from lorry.rpc.garbage import freeze_loaded
from lorry.rpc.heap import keep_freed_memory

MAX_MESSAGE_BYTES = 2 * MIB

log = logging.getLogger("lorry.adapter_store")


def hub_of(config: Config, store: Store) -> Hub:
    return Hub(
        store,
        allowed=config.hub_allow,
        commits_only=config.hub_commits_only,
        timeout_s=config.hub_timeout_s,
    )


def settings_of(config: Config, base_model: BaseModel) -> Settings:
    return Settings(
        geometry=base_model.geometry,
        dtype=config.finite_in(base_model),
        limits=config.limits,
        shm_dir=config.shm_dir,
        ram_bytes=config.ram_bytes,
        builder_processes=config.builders,
        memory_dir=config.memory_dir or config.backend_url.directory,
    )


def open_backend(config: Config, base_model: BaseModel) -> Backend:
    return config.backend_url.open(model_digest=base_model.digest, geometry=base_model.geometry)


def registry(store: Store, calls: CallCounts) -> CollectorRegistry:
    return registry_of(
        TableCollector(METRICS, store), TableCollector(call_metrics("lorry_store"), calls)
    )


async def serve(config: Config) -> None:
    """Serve until SIGINT or SIGTERM, then drain."""
    base_model = read_base_model(config.model)
    settings, calls, tls = settings_of(config, base_model), CallCounts(), config.server_tls()
    async with (
        opened(partial(open_backend, config, base_model), settings) as store,
        importing(store, config.import_dir, delete=config.import_delete) as imports,
        serving_metrics(config.scraped_address, registry(store, calls), tls),
        serving(
            lambda server: register(
                server, store, base_model, imports=imports, hub=hub_of(config, store)
            ),
            services=SERVICES,
            address=config.address,
            authenticator=config.authenticator(),
            insecure=config.insecure,
            tls=tls,
            health_address=config.health_address,
            max_receive_bytes=MAX_MESSAGE_BYTES,
            calls=calls,
        ) as server,
    ):
        server.announce("adapter_store")
        store.follower.when_reachable_changes(lambda well: server.set_health("backend", well))
        adapters, dtype = store.catalogue.num_adapters, settings.dtype.value
        log.info("%s adapters, values finite in %s", adapters, dtype)
        freeze_loaded()
        await server.set_ready(True)
        await stop_requested()
        await server.start_draining()
        await store.start_draining()


def run(config: Config) -> None:
    keep_freed_memory()
    asyncio.run(serve(config))


def main() -> None:
    run_service(Config, run, name="adapter-store", help="Keep LoRA adapters and hand them out.")


if __name__ == "__main__":
    main()
