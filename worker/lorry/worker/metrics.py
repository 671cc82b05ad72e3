"""The worker's metrics: what the front counts, and what the engine's last Status says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import ProcessCollector
from prometheus_client.registry import Collector

from lorry.rpc.histogram import Histogram
from lorry.rpc.metrics import Metric, counter, gauge, histogram
from lorry.worker.counts import RequestCounts
from lorry.worker.engine_client import EngineClient
from lorry.worker.front import Front
from lorry.worker.images import ImageFetcher
from lorry.worker.messages import Status


@dataclass(frozen=True, slots=True)
class Source:
    """What the metrics are read from."""

    front: Front
    images: ImageFetcher
    engine: EngineClient

    @property
    def counts(self) -> RequestCounts:
        return self.front.counts

    @property
    def status(self) -> Status:
        return self.front.state.engine

    def pages(self) -> Mapping[tuple[str], int]:
        status = self.status
        return {
            ("kv",): status.pages_kv,
            ("adapter",): status.pages_adapter,
            ("prefix",): status.pages_cached,
            ("free",): status.pages_free,
        }

    def step_seconds(self) -> Mapping[tuple[str], Histogram]:
        return _labelled(self.status.step_statistics.seconds)


METRICS: Sequence[Metric[Source]] = (
    counter(
        "lorry_worker_requests_received_total",
        "Requests that routers submitted; each ends in lorry_worker_requests_total",
        lambda s: s.counts.received,
    ),
    counter(
        "lorry_worker_requests_total",
        "Requests that have ended, by status code and reason",
        lambda s: s.counts.ended,
        ("code", "reason"),
    ),
    gauge(
        "lorry_worker_requests_in_progress",
        "Requests that the engine has, running or waiting",
        lambda s: s.front.num_requests,
    ),
    gauge(
        "lorry_worker_engine_requests",
        "Requests in the engine's last report, by state: running or waiting",
        lambda s: {("running",): s.status.running, ("waiting",): s.status.waiting},
        ("state",),
    ),
    gauge(
        "lorry_worker_waiting_prompt_tokens",
        "Tokens of prompts that the engine has yet to compute",
        lambda s: s.status.queued_prompt_tokens,
    ),
    counter(
        "lorry_worker_prompt_tokens_total",
        "Tokens of submitted prompts",
        lambda s: s.counts.prompt_tokens,
    ),
    counter(
        "lorry_worker_output_tokens_total",
        "Tokens that were drawn",
        lambda s: s.counts.output_tokens,
    ),
    histogram(
        "lorry_worker_prefill_seconds",
        "From a request's first prompt chunk until its first token",
        lambda s: s.counts.prefill_s,
    ),
    histogram(
        "lorry_worker_adapter_wait_seconds",
        "From a request's arrival until its adapter was resident, where it was not",
        lambda s: s.counts.adapter_wait_s,
    ),
    histogram(
        "lorry_worker_step_seconds",
        "Of a step, by kind: decode, or mixed with prompt chunks",
        Source.step_seconds,
        ("kind",),
    ),
    histogram(
        "lorry_worker_step_rows",
        "Tokens that a step computes",
        lambda s: s.status.step_statistics.rows,
    ),
    histogram(
        "lorry_worker_step_sequences",
        "Requests that a step computes tokens of",
        lambda s: s.status.step_statistics.sequences,
    ),
    histogram(
        "lorry_worker_step_adapters",
        "Distinct adapters in a step, the base model not counted",
        lambda s: s.status.step_statistics.adapters,
    ),
    counter(
        "lorry_worker_graph_replays_total",
        "Steps that were replays of a CUDA graph",
        lambda s: s.status.graph_replays,
    ),
    counter(
        "lorry_worker_eager_steps_total",
        "Steps that were not, such as all on the CPU",
        lambda s: s.status.eager_steps,
    ),
    counter(
        "lorry_worker_padded_rows_total",
        "Rows that were computed for nothing, to fill up a graph's size",
        lambda s: s.status.padded_rows,
    ),
    counter(
        "lorry_worker_preemptions_total",
        "Running requests that gave up their pages to older ones",
        lambda s: s.status.preemptions,
    ),
    gauge(
        "lorry_worker_pool_pages",
        "Pages of the pool, by use: kv of running requests, adapter, prefix (cached, not in use), "
        "free",
        Source.pages,
        ("use",),
    ),
    gauge(
        "lorry_worker_adapters",
        "Adapter versions, by tier: gpu or host",
        lambda s: {(tier,): number for tier, number in s.front.num_adapters.items()},
        ("tier",),
    ),
    histogram(
        "lorry_worker_adapter_load_seconds",
        "Of a load into the pool, by source: shm or chunks, the first load after a fetch from the "
        "adapter store, or host, a further one of the image that was kept",
        lambda s: _labelled(s.status.loads.seconds),
        ("source",),
    ),
    counter(
        "lorry_worker_adapter_load_bytes_total",
        "Bytes of adapters loaded into the pool, by source",
        lambda s: {(source,): number for source, number in s.status.loads.num_bytes.items()},
        ("source",),
    ),
    counter(
        "lorry_worker_adapter_evictions_total",
        "Adapters that left the pool",
        lambda s: s.status.adapter_evictions,
    ),
    counter(
        "lorry_worker_prefix_query_tokens_total",
        "Tokens of prompts that were looked up in the prefix cache",
        lambda s: s.status.prefix_query_tokens,
    ),
    counter(
        "lorry_worker_prefix_hit_tokens_total",
        "Of those, tokens that were found there",
        lambda s: s.status.prefix_hit_tokens,
    ),
    counter(
        "lorry_worker_prefix_evictions_total",
        "Pages that left the prefix cache",
        lambda s: s.status.prefix_evictions,
    ),
    histogram(
        "lorry_worker_fetch_seconds",
        "Of a fetch from the adapter store, its turn, attempts and pauses together, "
        "by source: shm or chunks",
        lambda s: _labelled(s.images.fetches.seconds),
        ("source",),
    ),
    counter(
        "lorry_worker_fetch_bytes_total",
        "Bytes of page images mapped or copied from the adapter store, by source",
        lambda s: {(source,): number for source, number in s.images.fetches.num_bytes.items()},
        ("source",),
    ),
    counter(
        "lorry_worker_fetch_failures_total",
        "Fetches that failed, by status code and reason",
        lambda s: s.images.failures,
        ("code", "reason"),
    ),
    gauge(
        "lorry_worker_images",
        "Page images that are held or being fetched",
        lambda s: s.images.num_held,
    ),
    gauge(
        "lorry_worker_copied_image_bytes",
        "Memory of page images that came in chunks",
        lambda s: s.images.copied_bytes,
    ),
    gauge(
        "lorry_worker_routers_attached",
        "Routers with a stream to this worker",
        lambda s: s.front.num_routers,
    ),
    gauge(
        "lorry_worker_draining",
        "1 if no new requests are taken, else 0",
        lambda s: s.front.draining,
    ),
    gauge(
        "lorry_worker_engine_silence_seconds",
        "Since the engine's last message",
        lambda s: s.engine.silent_s,
    ),
)


def engine_process_collector(pid: Callable[[], int | None]) -> Collector:
    """CPU time, memory and files of the engine's process, beside those of the front."""
    return ProcessCollector("lorry_worker_engine", pid=lambda: pid() or "none", registry=None)


def _labelled(histograms: Mapping[str, Histogram]) -> Mapping[tuple[str], Histogram]:
    return {(label,): values for label, values in histograms.items()}
