"""A whole router, wired up: it serves while a block runs."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc.aio

from lorry.router.active import ActiveRequests
from lorry.router.config import Config
from lorry.router.discovery import Discovery, Resolve, Target, resolve_host
from lorry.router.dispatcher import Dispatcher
from lorry.router.fleet import Fleet
from lorry.router.metrics import METRICS, Source
from lorry.router.places import Amount, Places
from lorry.router.policies import make_policies
from lorry.router.rates import RateLimits
from lorry.router.readiness import Readiness
from lorry.router.roster import Roster
from lorry.router.router import Router
from lorry.router.service import SERVICE, InferenceService
from lorry.router.slo_counts import SloCounts
from lorry.router.store import Store
from lorry.router.tenants import Tenants, read_tenants
from lorry.router.tokenizer import Tokenizer
from lorry.router.translation import SpecReader
from lorry.router.worker_link import WorkerLink
from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.rpc.call_counts import CallCounts, call_metrics
from lorry.rpc.channel import Channels, open_channel
from lorry.rpc.metrics import TableCollector, registry_of
from lorry.rpc.metrics_server import serving_metrics
from lorry.rpc.server import ConnectionAge, Server, serving
from lorry.rpc.tls import ServerTls
from lorry.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server

MAX_REQUEST_BYTES = 2 << 20
CONNECTION_S = 3600.0  # after which a client's connection is renewed
SPARE_S = 60.0  # for the status of a request that ends by its deadline


@dataclass(frozen=True, slots=True)
class Running:
    server: Server
    router: Router

    async def drain(self) -> None:
        """Tell probes and clients to go elsewhere and let what runs finish, within the grace."""
        await self.server.start_draining()
        await self.router.drain()


@contextlib.asynccontextmanager
async def running(config: Config, *, resolve: Resolve = resolve_host) -> AsyncIterator[Running]:
    """Raises ValueError for a model, file or address that cannot be served."""
    tls = config.server_tls()
    base_model = await asyncio.to_thread(read_base_model, config.model)
    tenants = read_tenants(config.tenants_file, config.other_tenants)
    readiness = Readiness()
    async with contextlib.AsyncExitStack() as stack:
        tokenizer = await _tokenizer(config)
        stack.callback(tokenizer.close)
        store = await stack.enter_async_context(_store(config, readiness))
        dispatcher = _dispatcher(config, tenants)
        active = ActiveRequests(dispatcher, SloCounts(tenants.named, config.slo_label))
        fleet = Fleet(config, dispatcher, active, on_workers=readiness.set_workers)
        roster = _roster(config, fleet, base_model, resolve)
        fleet.connect(roster.links)
        parts = (dispatcher, active, fleet, tokenizer, store, tenants)
        router = Router(config, *parts, max_context_tokens=base_model.max_context_tokens)
        calls = CallCounts()
        registry = registry_of(
            TableCollector(METRICS, Source(active, dispatcher, fleet, store)),
            TableCollector(call_metrics("lorry_router"), calls),
        )
        await stack.enter_async_context(serving_metrics(config.scraped_address, registry, tls))
        reader = SpecReader(base_model, served_model=config.served_model)
        service = InferenceService(router, reader)
        server = await stack.enter_async_context(_serving(config, tls, service, calls))
        works = (
            roster.run(),
            store.watch(),
            router.watch_clients(),
            readiness.report(server.set_ready),
        )
        await stack.enter_async_context(_at_work(*works))
        yield Running(server, router)


@contextlib.asynccontextmanager
async def _at_work(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Ends the block if one of them fails, and cancels them when it is left."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


@contextlib.asynccontextmanager
async def _store(config: Config, readiness: Readiness) -> AsyncIterator[Store]:
    async with open_channel(config.store, config.credentials()) as channel:
        yield Store(
            channel,
            silence_s=config.catalogue_silence_s,
            timeout_s=config.store_timeout_s,
            on_synced=readiness.set_catalogue_synced,
        )


async def _tokenizer(config: Config) -> Tokenizer:
    return await asyncio.to_thread(
        Tokenizer.read, config.model, num_threads=config.tokenizer_threads
    )


def _dispatcher(config: Config, tenants: Tenants) -> Dispatcher:
    places = Places(
        limit=Amount(config.max_queued_requests, config.max_queued_tokens),
        tenant_limit=lambda tenant: Amount(
            tenants[tenant].max_queued_requests, tenants[tenant].max_queued_tokens
        ),
    )
    policies = make_policies(config, weight=tenants.weight)
    rates = RateLimits(tenants.rates, burst_s=config.rate_burst_s)
    return Dispatcher(places, policies, max_prefetch=config.prefetch_versions, rates=rates)


def _roster(config: Config, fleet: Fleet, base_model: BaseModel, resolve: Resolve) -> Roster:
    discovery = Discovery([Target.parse(text) for text in config.worker], resolve)
    router_id = uuid.uuid4().hex
    channels = Channels(config.credentials())

    def make_link(address: str) -> WorkerLink:
        return WorkerLink(
            address,
            fleet,
            router_id=router_id,
            model_digest=base_model.digest,
            channels=channels,
            server_name=discovery.host_of(address),
            silence_s=config.worker_silence_s,
        )

    return Roster(discovery, make_link, interval_s=config.dns_interval_s)


def _serving(
    config: Config, tls: ServerTls | None, service: InferenceService, calls: CallCounts
) -> contextlib.AbstractAsyncContextManager[Server]:
    def register(server: grpc.aio.Server) -> None:
        add_InferenceServiceServicer_to_server(service, server)

    return serving(
        register,
        services=[SERVICE],
        address=config.address,
        authenticator=config.authenticator(),
        insecure=config.insecure,
        tls=tls,
        health_address=config.health_address,
        max_receive_bytes=MAX_REQUEST_BYTES,
        calls=calls,
        connection_age=ConnectionAge(CONNECTION_S, config.max_request_s + SPARE_S),
    )
