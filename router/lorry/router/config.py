"""The router's options."""

from dataclasses import dataclass
from pathlib import Path

import cyclopts

from lorry.router.discovery import Target
from lorry.router.policy_options import PolicyOptions
from lorry.router.slo import Slo
from lorry.router.tenants import Tenant
from lorry.rpc.command import check_not_negative, check_positive
from lorry.rpc.service_config import CallingServiceConfig


@cyclopts.Parameter(name="*", negative="")
@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions, CallingServiceConfig):
    address: str = "127.0.0.1:50051"

    model_name: str = ""
    """Name under which the base model is served; empty = the directory's name."""

    store: str = "127.0.0.1:50052"
    """HOST:PORT of the adapter store."""

    worker: tuple[str, ...] = ("127.0.0.1:50053",)
    """HOST:PORT of a worker, or dns:///NAME:PORT for every address that DNS has for the name.
    Repeat it for several."""

    dns_interval_s: float = 5.0
    """Seconds between two look-ups of a worker's DNS name."""

    max_queued_requests: int = 8192
    """Requests that may wait, of all tenants; the next is refused with QUEUE_FULL."""

    max_queued_requests_per_tenant: int = 4096
    """Requests of one tenant that may wait; the next is refused with TENANT_LIMIT."""

    max_queued_tokens: int = 16 << 20
    """Prompt tokens that may wait, of all tenants; more is refused with QUEUE_FULL. A text counts
    by its bytes until it is tokenized; a prompt that waits alone may be larger."""

    max_queued_tokens_per_tenant: int = 4 << 20
    """Prompt tokens of one tenant that may wait; more is refused with TENANT_LIMIT."""

    requests_per_s_per_tenant: float | None = None
    """Requests that one tenant may send a second; more is refused with TENANT_LIMIT. By default
    any number."""

    tokens_per_s_per_tenant: float | None = None
    """Tokens of prompts and outputs that one tenant may use a second; while it has used more, its
    requests are refused with TENANT_LIMIT. By default any number."""

    rate_burst_s: float = 10.0
    """Seconds' worth of its rates that a tenant may use at once after a pause."""

    tenants_file: Path | None = None
    """JSON file of tenants that get other weights, limits, rates and SLOs: {"tenants": {ID:
    {"weight": N, "max_queued_requests": N, "max_queued_tokens": N, "requests_per_s": N,
    "tokens_per_s": N, "slo_ttft_s": N, "slo_tpot_s": N}}}; what an entry leaves out is 1 and as the
    options say."""

    slo_ttft_s: float | None = None
    """Seconds to the first token that a request asks for which names none, nor does its tenant."""

    slo_tpot_s: float | None = None
    """Seconds per output token, likewise."""

    slo_label: str = ""
    """Key of a label of requests by whose first 32 values the metrics tell attained objectives
    apart; empty: by none."""

    max_request_s: float = 3600.0
    """Seconds that a request may live; also the deadline of a request that names none."""

    max_unsent_tokens: int = 16384
    """Tokens that may wait for a slow client; more end its request with SLOW_READER."""

    client_stall_s: float = 30.0
    """Seconds that one message to a client may take; then its request ends with SLOW_READER."""

    prefetch_versions: int = 32
    """Adapter versions of waiting requests that a worker is told to prepare."""

    worker_silence_s: float = 5.0
    """Seconds without a message after which a worker is lost."""

    worker_wait_s: float = 5.0
    """Seconds that a request which has lost its worker waits for one that can serve it."""

    store_timeout_s: float = 2.0
    """Seconds to wait for the store where the copy of its catalogue does not know an adapter."""

    catalogue_silence_s: float = 30.0
    """Seconds without a message after which the watch of the catalogue is begun again."""

    tokenizer_threads: int = 2
    """Threads that tokenize prompts of up to 64 KiB; longer ones share one of their own."""

    grace_s: float = 30.0
    """Seconds that running requests get to finish on SIGTERM."""

    def __post_init__(self) -> None:
        CallingServiceConfig.__post_init__(self)
        PolicyOptions.__post_init__(self)
        check_positive(
            self,
            "max_queued_requests",
            "max_queued_requests_per_tenant",
            "max_queued_tokens",
            "max_queued_tokens_per_tenant",
            "requests_per_s_per_tenant",
            "tokens_per_s_per_tenant",
            "rate_burst_s",
            "slo_ttft_s",
            "slo_tpot_s",
            "max_request_s",
            "max_unsent_tokens",
            "client_stall_s",
            "worker_silence_s",
            "dns_interval_s",
            "store_timeout_s",
            "catalogue_silence_s",
            "tokenizer_threads",
        )
        check_not_negative(self, "prefetch_versions", "worker_wait_s", "grace_s")
        if not self.worker:
            raise ValueError("worker must name at least one HOST:PORT")
        if len(set(self.worker)) < len(self.worker):
            raise ValueError(f"worker must name each HOST:PORT once, got {self.worker}")
        for text in self.worker:
            Target.parse(text)

    @property
    def other_tenants(self) -> Tenant:
        """What a tenant gets that the file does not name."""
        return Tenant(
            max_queued_requests=self.max_queued_requests_per_tenant,
            max_queued_tokens=self.max_queued_tokens_per_tenant,
            requests_per_s=self.requests_per_s_per_tenant,
            tokens_per_s=self.tokens_per_s_per_tenant,
            slo=Slo(ttft_s=self.slo_ttft_s, tpot_s=self.slo_tpot_s),
        )

    @property
    def served_model(self) -> str:
        return self.model_name or self.model.resolve().name
