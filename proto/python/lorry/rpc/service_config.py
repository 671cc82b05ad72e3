"""The options that the services have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorry.kernels.page_layout import Dtype
from lorry.rpc.identity import Authenticator
from lorry.rpc.server import check_address

DtypeName = Literal["fp32", "bf16", "fp16"]
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

    def __post_init__(self) -> None:
        check_address(self.address, insecure=self.insecure)

    def authenticator(self) -> Authenticator:
        """Raises ValueError naming an entry of the token file that is malformed."""
        return Authenticator.from_file(self.tokens, insecure=self.insecure)
