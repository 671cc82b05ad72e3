"""The options that the services have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from lorry.kernels.page_layout import Dtype
from lorry.rpc.callers import read_certificates, read_tokens
from lorry.rpc.channel import Credentials
from lorry.rpc.identity import Authenticator
from lorry.rpc.reloading import Reloading
from lorry.rpc.server import check_address, is_loopback_address
from lorry.rpc.tls import ServerTls

DtypeName = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")
METRICS_PORT_OFFSET = 1000
DTYPES: dict[DtypeName, Dtype] = {"fp32": Dtype.FP32, "bf16": Dtype.BF16, "fp16": Dtype.FP16}


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Base of each service's `Config`."""

    model: Path
    """Hugging Face directory of the base model; only the worker reads its weights."""

    address: str
    """HOST:PORT to listen on; port 0 takes a free one."""

    tokens: Path | None = None
    """JSON file of callers' token digests, tenants and roles; without one only callers of this
    machine are served."""

    tls: Path | None = None
    """Directory with tls.crt, tls.key and ca.crt, which may be replaced at any time: the service
    speaks TLS, and shows its certificate to services that it calls, which ca.crt must have signed;
    without one it speaks plain text."""

    tls_callers: Path | None = None
    """JSON file of names in callers' certificates, with their tenants and roles. With it callers
    must show a certificate that ca.crt has signed, and a token too if the file does not name it."""

    insecure: bool = False
    """Serve other machines in plain text, and without a file of callers any caller."""

    health_address: str = ""
    """HOST:PORT of a second port in plain text for nothing but health checks, which need no
    credentials: for probes that know no certificates. By default there is none."""

    metrics_address: str | None = None
    """HOST:PORT from which Prometheus may scrape, port 0 for a free one; empty for none. By default
    the port is that of address plus 1000, or a free one where that is 0, on 127.0.0.1."""

    def __post_init__(self) -> None:
        guarded = self.insecure or self.tls is not None
        check_address(self.address, guarded=guarded)
        if self.scraped_address:
            check_address(self.scraped_address, guarded=guarded, field="metrics_address")
        if self.health_address:
            check_address(self.health_address, guarded=True, field="health_address")
        if self.tls_callers is not None and self.tls is None:
            raise ValueError("tls_callers needs tls: a directory with ca.crt")
        if not (self.insecure or self.tokens or self.tls_callers or self._is_local):
            raise ValueError(
                f"address {self.address!r} is reachable from other machines: "
                "tokens or tls_callers must say who may call"
            )

    @property
    def _is_local(self) -> bool:
        return is_loopback_address(self.address)

    @property
    def scraped_address(self) -> str:
        """Where metrics are served; empty: nowhere."""
        if self.metrics_address is not None:
            return self.metrics_address
        port = int(self.address.rpartition(":")[2])
        return f"127.0.0.1:{port + METRICS_PORT_OFFSET if port else 0}"

    def authenticator(self) -> Authenticator:
        """By the files as they are when a call comes; raises ValueError for a malformed entry."""
        return Authenticator(
            _reloading(self.tokens, read_tokens),
            _reloading(self.tls_callers, read_certificates),
            insecure=self.insecure,
        )

    def server_tls(self) -> ServerTls | None:
        """Raises ValueError naming a file that is missing or damaged."""
        return None if self.tls is None else ServerTls(self.tls, mutual=bool(self.tls_callers))


def _reloading(path: Path | None, read: Callable[[Path], T]) -> Callable[[], T] | None:
    return None if path is None else Reloading([path], lambda: read(path)).get


@dataclass(frozen=True, kw_only=True)
class CallingServiceConfig(ServiceConfig):
    """Base of the `Config` of a service that calls others."""

    token_file: Path | None = None
    """File with the bearer token that is shown to the services that this one calls."""

    def credentials(self) -> Credentials:
        """What this service shows to others."""
        return Credentials(token_file=self.token_file, tls=self.tls)
