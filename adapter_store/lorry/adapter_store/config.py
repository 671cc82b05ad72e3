"""The options of an adapter store."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import cyclopts

from lorry.adapter_store.limits import Limits
from lorry.kernels.page_layout import Dtype
from lorry.rpc.command import check_positive
from lorry.rpc.server import check_address

DTYPES = {"bfloat16": Dtype.BF16, "float16": Dtype.FP16, "float32": Dtype.FP32}
ServingDtype = Literal["auto", "bfloat16", "float16", "float32"]
SHM_DIR = Path(f"/dev/shm/lorry-{os.geteuid()}")
BACKEND = f"file://{Path.home()}/.local/share/lorry/adapters"


@cyclopts.Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Config:
    model: Path
    """Directory of the base model; only its config and the headers of its weights are read."""

    address: str = "127.0.0.1:50052"
    """HOST:PORT to listen on; port 0 takes a free one."""

    backend: str = BACKEND
    """Where adapters are kept durably: file:///DIRECTORY."""

    shm_dir: Path = SHM_DIR
    """Directory in shared memory for page images; workers on this host need the same one."""

    ram_bytes: int = 4 << 30
    """Bytes of page images to hold in shared memory at most."""

    serving_dtype: ServingDtype = "auto"
    """Dtype in which uploaded values must be finite; auto = that of the base model."""

    builders: int = 2
    """Processes that check uploads and pack page images."""

    max_weights_bytes: int = 4 << 30
    """Size of one adapter's safetensors file at most."""

    tenant_uploads: int = 64
    """Uploads that a tenant may have under way."""

    tenant_adapters: int = 20_000
    """Adapters that a tenant may have."""

    tenant_bytes: int = 1 << 40
    """Bytes of all versions and uploads that a tenant may have."""

    upload_expiry_s: int = 3600
    """Seconds without a new chunk after which an upload is forgotten."""

    versions_kept: int = 8
    """Versions of a name that stay available to roll back to."""

    tokens: Path | None = None
    """JSON file of callers' tokens; without it only callers of this machine are served."""

    insecure: Annotated[bool, cyclopts.Parameter(negative="")] = False
    """Serve other machines without TLS, and without a token file any caller."""

    def __post_init__(self) -> None:
        check_address(self.address, insecure=self.insecure)
        backend = urlsplit(self.backend)
        if backend.scheme != "file" or backend.netloc or not backend.path.startswith("/"):
            raise ValueError(f"backend must be file:///DIRECTORY, got {self.backend!r}")
        check_positive(self, "ram_bytes", "builders", *Limits.__dataclass_fields__)

    @property
    def backend_directory(self) -> Path:
        return Path(unquote(urlsplit(self.backend).path))

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})

    def finite_in(self, model_dtype: object) -> Dtype:
        """The dtype of the finite check for a base model of this dtype; unknown is bfloat16."""
        chosen = self.serving_dtype if self.serving_dtype != "auto" else str(model_dtype)
        return DTYPES.get(chosen, Dtype.BF16)
