"""The options that the services have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorry.kernels.page_layout import Dtype
from lorry.rpc.identity import Authenticator
from lorry.rpc.server import check_address

DtypeName = Literal["fp32", "bf16", "fp16"]
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

    insecure: bool = False
    """Serve other machines in plain text, and without a token file any caller."""

    metrics_address: str | None = None
    """HOST:PORT from which Prometheus may scrape, port 0 for a free one; empty for none. By default
    the port is that of address plus 1000, or a free one where that is 0, on 127.0.0.1."""

    def __post_init__(self) -> None:
        check_address(self.address, insecure=self.insecure)
        if self.scraped_address:
            check_address(self.scraped_address, insecure=self.insecure, field="metrics_address")

    @property
    def scraped_address(self) -> str:
        """Where metrics are served; empty: nowhere."""
        if self.metrics_address is not None:
            return self.metrics_address
        port = int(self.address.rpartition(":")[2])
        return f"127.0.0.1:{port + METRICS_PORT_OFFSET if port else 0}"

    def authenticator(self) -> Authenticator:
        """Raises ValueError naming an entry of the token file that is malformed."""
        return Authenticator.from_file(self.tokens, insecure=self.insecure)
