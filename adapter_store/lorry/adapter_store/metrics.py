"""The store's metrics."""

from collections.abc import Sequence

from lorry.adapter_store.store import Store
from lorry.rpc.metrics import Metric, counter, gauge, histogram

METRICS: Sequence[Metric[Store]] = (
    gauge(
        "lorry_store_adapters",
        "Adapters of all tenants",
        lambda store: store.catalogue.num_adapters,
    ),
    gauge(
        "lorry_store_catalogue_revision",
        "Number of the newest change of the catalogue",
        lambda store: store.catalogue.revision,
    ),
    gauge(
        "lorry_store_backend_reachable",
        "Whether what keeps the adapters answers: 1, or 0 while only what is in memory is served",
        lambda store: int(store.follower.reachable),
    ),
    gauge(
        "lorry_store_uploads_open",
        "Uploads that have begun and neither ended nor expired",
        lambda store: store.uploads.num_open,
    ),
    counter(
        "lorry_store_uploads_total",
        "Uploads that have ended, by how: published, failed or expired",
        lambda store: store.uploads.counts.ended,
        ("end",),
    ),
    counter(
        "lorry_store_upload_received_bytes_total",
        "Bytes of weights that were received and kept",
        lambda store: store.uploads.counts.received_bytes,
    ),
    gauge(
        "lorry_store_ram_bytes",
        "Memory that page images take or have reserved",
        lambda store: store.images.used_bytes,
    ),
    gauge(
        "lorry_store_ram_limit_bytes",
        "Memory that page images may take",
        lambda store: store.images.budget_bytes,
    ),
    gauge(
        "lorry_store_ram_images",
        "Page images in memory",
        lambda store: store.images.num_images,
    ),
    gauge(
        "lorry_store_leases",
        "Leases of page images that workers hold",
        lambda store: store.images.num_leases,
    ),
    counter(
        "lorry_store_image_lookups_total",
        "Page images that were asked for, by their state then: ready (a hit), building, or absent",
        lambda store: store.images.counts.wanted,
        ("state",),
    ),
    counter(
        "lorry_store_image_lookup_bytes_total",
        "Bytes of the page images that were leased, by their state when they were asked for",
        lambda store: store.images.counts.wanted_bytes,
        ("state",),
    ),
    counter(
        "lorry_store_images_built_ahead_total",
        "Page images that were built before anybody asked: wanted in an earlier life, or pinned",
        lambda store: store.images.counts.built_ahead,
    ),
    gauge(
        "lorry_store_pins",
        "Adapters whose page images an operator has pinned",
        lambda store: len(store.warmer.pins),
    ),
    counter(
        "lorry_store_image_evictions_total",
        "Page images that made room for others",
        lambda store: store.images.counts.evictions,
    ),
    histogram(
        "lorry_store_image_build_seconds",
        "To build a page image: to read its weights, make room and pack them",
        lambda store: store.images.counts.build_s,
    ),
    histogram(
        "lorry_store_backend_read_seconds",
        "Until the backend has a version's weights at hand to build a page image from",
        lambda store: store.images.counts.read_s,
    ),
    counter(
        "lorry_store_image_built_bytes_total",
        "Bytes of the page images that were built",
        lambda store: store.images.counts.built_bytes,
    ),
    counter(
        "lorry_store_image_build_failures_total",
        "Page images that could not be built",
        lambda store: store.images.counts.failed_builds,
    ),
    counter(
        "lorry_store_fetches_total",
        "Page images that were given to workers, by transport: shm (shared memory) or chunks",
        lambda store: store.fetches.begun,
        ("transport",),
    ),
    counter(
        "lorry_store_fetched_bytes_total",
        "Bytes of page images that were handed out or sent to workers, by transport",
        lambda store: store.fetches.num_bytes,
        ("transport",),
    ),
    histogram(
        "lorry_store_lease_seconds",
        "From a worker's fetch until its page image is leased, built if need be",
        lambda store: store.fetches.lease_s,
    ),
)
