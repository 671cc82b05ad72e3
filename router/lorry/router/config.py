"""The router's options."""

from dataclasses import dataclass
from pathlib import Path

import cyclopts

from lorry.rpc.command import check_not_negative, check_positive


@cyclopts.Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Config:
    """All sizes are counts and all times seconds unless the name says otherwise."""

    model: Path
    """Directory of the base model: config.json, tokenizer.json and the safetensors files, of which
    only the headers are read."""

    model_name: str = ""
    """Name under which the base model is served; empty = the directory's name."""

    address: str = "127.0.0.1:50051"
    """Where to serve, host:port; port 0 takes a free one."""

    store: str = "127.0.0.1:50052"
    """The adapter store, host:port."""

    worker: tuple[str, ...] = ("127.0.0.1:50053",)
    """A worker, host:port. Repeat it for several workers."""

    tokens: Path | None = None
    """File of the callers' token digests, tenants and roles; without one only callers of this
    machine are served."""

    token_file: Path | None = None
    """File with the bearer token that the router shows to the store and the workers."""

    insecure: bool = False
    """Serve plain text to other machines too."""

    max_queued_requests: int = 8192
    """Requests that may wait, of all tenants; the next is refused with QUEUE_FULL."""

    max_queued_requests_per_tenant: int = 4096
    """Requests of one tenant that may wait; the next is refused with TENANT_LIMIT."""

    max_request_s: float = 3600.0
    """Longest life of a request; also the deadline of a request that names none."""

    max_unsent_tokens: int = 16384
    """Tokens that may wait for a slow client; more end its request with SLOW_READER."""

    client_stall_s: float = 30.0
    """Time that one message to a client may take; then its request ends with SLOW_READER."""

    prefetch_versions: int = 32
    """Adapter versions of waiting requests that a worker is told to prepare."""

    placement_imbalance: int = 8
    """Requests by which a worker that holds the adapter may be busier than the idlest one and still
    be preferred."""

    worker_silence_s: float = 5.0
    """A worker that sends nothing for so long is lost."""

    worker_wait_s: float = 5.0
    """How long a request that has lost its worker waits for one that can serve it."""

    store_timeout_s: float = 2.0
    """How long to wait for the store where the local copy of the catalogue does not know an
    adapter."""

    catalogue_silence_s: float = 30.0
    """The watch of the catalogue is begun again when the store sends nothing for so long."""

    tokenizer_threads: int = 2
    """Threads that tokenize prompts."""

    drain_grace_s: float = 30.0
    """How long running requests may take to finish after SIGTERM."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "max_queued_requests",
            "max_queued_requests_per_tenant",
            "max_request_s",
            "max_unsent_tokens",
            "client_stall_s",
            "worker_silence_s",
            "store_timeout_s",
            "catalogue_silence_s",
            "tokenizer_threads",
        )
        check_not_negative(
            self, "prefetch_versions", "placement_imbalance", "worker_wait_s", "drain_grace_s"
        )
        if not self.worker:
            raise ValueError("worker must name at least one HOST:PORT")
        if len(set(self.worker)) < len(self.worker):
            raise ValueError(f"worker must name each HOST:PORT once, got {self.worker}")

    @property
    def served_model(self) -> str:
        return self.model_name or self.model.resolve().name
