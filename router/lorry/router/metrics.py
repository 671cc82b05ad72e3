"""The router's metrics."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorry.router.active import ActiveRequests
from lorry.router.dispatcher import Dispatcher
from lorry.router.fleet import Fleet
from lorry.router.request import FINAL, RequestState
from lorry.router.store import Store
from lorry.rpc.histogram import Histogram
from lorry.rpc.metrics import Metric, counter, gauge, histogram

STATES = [state for state in RequestState if state not in FINAL]


@dataclass(frozen=True, slots=True)
class Source:
    """What the metrics are read from."""

    active: ActiveRequests
    dispatcher: Dispatcher
    fleet: Fleet
    store: Store

    def in_progress(self) -> Mapping[tuple[str], int]:
        states = Counter(request.state for request in self.active)
        return {(state.name.lower(),): states[state] for state in STATES}

    def predicted_ttft_s(self) -> float:
        """Of the queued request that is to wait longest; 0 if none is."""
        queued = (each for each in self.active if each.state is RequestState.QUEUED)
        return max((request.predicted_ttft_s or 0.0 for request in queued), default=0.0)

    def workers_attached(self) -> Mapping[tuple[str], int]:
        attached = {worker.name for worker in self.dispatcher.workers}
        return {(name,): name in attached for name in self.fleet.worker_names}

    def worker_requests(self) -> Mapping[tuple[str], int]:
        return {(worker.name,): worker.load for worker in self.dispatcher.workers}

    def worker_room(self) -> Mapping[tuple[str], int]:
        workers = self.dispatcher.workers
        return {(w.name,): w.submit_limit - w.num_submitted if w.has_room else 0 for w in workers}

    def prediction_errors(self) -> Mapping[tuple[str], Histogram]:
        errors = self.dispatcher.prediction_errors
        return {("arrival",): errors.at_arrival, ("submit",): errors.at_submit}

    def worker_adapters(self) -> Mapping[tuple[str, str], int]:
        tiers = [
            (w.name, tier, versions)
            for w in self.dispatcher.workers
            for tier, versions in (("gpu", w.gpu), ("host", w.host))
        ]
        return {(name, tier): len(versions) for name, tier, versions in tiers}


METRICS: Sequence[Metric[Source]] = (
    counter(
        "lorry_router_requests_received_total",
        "Valid requests for output; each ends in lorry_router_requests_total",
        lambda s: s.active.counts.received,
    ),
    counter(
        "lorry_router_requests_total",
        "Requests that have ended, by status code and reason; of clients that left, CANCELLED",
        lambda s: s.active.counts.ended,
        ("code", "reason"),
    ),
    gauge(
        "lorry_router_requests_in_progress",
        "Requests that have not ended, by state; the queue's depth is that of queued",
        Source.in_progress,
        ("state",),
    ),
    histogram(
        "lorry_router_queue_seconds",
        "From a request's arrival until it is first sent to a worker",
        lambda s: s.active.counts.queue_s,
    ),
    histogram(
        "lorry_router_ttft_seconds",
        "From a request's arrival until its first token comes from a worker",
        lambda s: s.active.counts.ttft_s,
    ),
    gauge(
        "lorry_router_predicted_ttft_seconds",
        "The longest time to a first token that was predicted, on arrival, for one that is queued",
        Source.predicted_ttft_s,
    ),
    histogram(
        "lorry_router_token_gap_seconds",
        "Between two tokens of a request as they come from workers",
        lambda s: s.active.counts.token_gap_s,
    ),
    counter(
        "lorry_router_slo_requests_total",
        "Requests with an objective that have ended, by tenant (other: not in the tenants file), "
        "value of the label that --slo-label names, and outcome: met or missed, which whatever is "
        "aborted or refused counts as. Their rates are goodput and attainment",
        lambda s: s.active.slo_counts.requests,
        ("tenant", "label", "outcome"),
    ),
    counter(
        "lorry_router_slo_satisfaction_total",
        "Sum of those requests' satisfaction, 1 - (TTFT / SLO)^2 where the first token was in time",
        lambda s: s.active.slo_counts.satisfaction,
        ("tenant", "label"),
    ),
    gauge(
        "lorry_router_overloaded",
        "1 while more requests with objectives wait than can be served in time, else 0",
        lambda s: s.dispatcher.overloaded,
    ),
    histogram(
        "lorry_router_ttft_prediction_error_ratio",
        "How far a predicted time to first token was off, as a share of the true one, by when it "
        "was predicted: at arrival, or at the submit for what was left of it",
        Source.prediction_errors,
        ("at",),
    ),
    counter(
        "lorry_router_prompt_tokens_total",
        "Tokens of the prompts of requests that were sent to a worker",
        lambda s: s.active.counts.prompt_tokens,
    ),
    counter(
        "lorry_router_output_tokens_total",
        "Tokens that workers drew for requests in progress",
        lambda s: s.active.counts.output_tokens,
    ),
    counter(
        "lorry_router_requests_resumed_total",
        "Requests queued again because their worker was lost or gave them up",
        lambda s: s.dispatcher.num_requeued,
    ),
    counter(
        "lorry_router_workers_lost_total",
        "Streams to workers that ended",
        lambda s: s.active.counts.workers_lost,
    ),
    gauge(
        "lorry_router_worker_attached",
        "1 if there is a stream to the worker, else 0, by the worker's address",
        Source.workers_attached,
        ("worker",),
    ),
    gauge(
        "lorry_router_worker_requests",
        "Requests of this router that an attached worker works on",
        Source.worker_requests,
        ("worker",),
    ),
    gauge(
        "lorry_router_worker_submit_room",
        "Requests that an attached worker takes beyond those",
        Source.worker_room,
        ("worker",),
    ),
    gauge(
        "lorry_router_worker_adapters",
        "Adapter versions on an attached worker, by tier: gpu or host",
        Source.worker_adapters,
        ("worker", "tier"),
    ),
    gauge(
        "lorry_router_catalogue_adapters",
        "Adapters in the router's copy of the store's catalogue",
        lambda s: s.store.num_adapters,
    ),
    gauge(
        "lorry_router_catalogue_watching",
        "1 while the store's changes arrive as they happen, else 0",
        lambda s: s.store.watching,
    ),
)
