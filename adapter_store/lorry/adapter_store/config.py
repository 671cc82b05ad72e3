"""The options of an adapter store."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import cyclopts

from lorry.adapter_store.backend_url import BackendUrl
from lorry.adapter_store.limits import Limits, TenantLimits, read_tenant_limits
from lorry.kernels.page_layout import Dtype
from lorry.rpc.base_model import BaseModel
from lorry.rpc.command import check_positive
from lorry.rpc.service_config import DTYPES, DtypeName, ServiceConfig
from lorry.rpc.shared_memory import SHM_DIR

MODEL_DTYPES = {"bfloat16": Dtype.BF16, "float16": Dtype.FP16, "float32": Dtype.FP32}
LIMITS = Limits()
BACKEND = f"file://{Path.home()}/.local/share/lorry/adapters"


@cyclopts.Parameter(name="*", negative="")
@dataclass(frozen=True, kw_only=True)
class Config(ServiceConfig):
    address: str = "127.0.0.1:50052"

    backend: str = field(default=BACKEND, repr=False)
    """Where adapters are kept durably: file:///DIRECTORY of this store alone, or
    redis[s]://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE] of any number of stores. Or, for load tests,
    dummy:COUNT[?ranks=R,...&modules=NAME,...]: random adapters that are kept nowhere."""

    redis_password_file: Path | None = None
    """File that holds the password of the Redis, rather than the URL."""

    redis_ca_file: Path | None = None
    """Certificates (PEM) of who may sign that of a rediss:// Redis; by default the system's."""

    scratch_dir: Path | None = None
    """Directory for weights that a page image is made of where they are not in files already; by
    default the system's for temporary files."""

    shm_dir: Path = SHM_DIR
    """Directory in shared memory for page images; workers on this host need the same one."""

    ram_bytes: int | None = None
    """Bytes of page images to hold in shared memory at most; by default 4 GiB, or half of what the
    file system of shm_dir can hold where that is less."""

    memory_dir: Path | None = None
    """Directory for memory.json: which adapters are pinned, and which page images were wanted most
    and are built first at the next start. By default that of a file:// backend."""

    dtype: DtypeName | None = None
    """Type in which uploaded values must be finite; by default the base model's."""

    builders: int = 2
    """Processes that pack page images, and as many that check uploads at a lower priority."""

    max_weights_bytes: int = LIMITS.max_weights_bytes
    """Size of one adapter's safetensors file at most."""

    tenant_uploads: int = LIMITS.tenant.uploads
    """Uploads that a tenant may have under way."""

    tenant_adapters: int = LIMITS.tenant.adapters
    """Adapters that a tenant may have."""

    tenant_bytes: int = LIMITS.tenant.bytes
    """Bytes of all versions and uploads that a tenant may have."""

    tenant_rank: int = LIMITS.tenant.rank
    """Largest rank of an adapter that a tenant may have."""

    limits_file: Path | None = None
    """JSON file of tenants that may have more or less than that: {"tenants": {ID: {"uploads": N,
    "adapters": N, "bytes": N, "rank": N}}}; what an entry leaves out is as above."""

    import_dir: Path | None = None
    """Directory to watch: what lies in TENANT/ADAPTER, adapter_config.json and
    adapter_model.safetensors, is published as that tenant's adapter once it has not changed for two
    seconds. Names that begin with a dot are left alone: write there, then rename."""

    import_delete: bool = False
    """Delete an adapter when its directory in import_dir is removed."""

    hub_allow: tuple[str, ...] = ()
    """Repositories of the Hugging Face hub from which operators may import, such as my-org/* or
    my-org/sql; may be repeated. By default none. HF_ENDPOINT and HF_TOKEN are the library's."""

    hub_commits_only: bool = False
    """Import whole commits only, no branches or tags."""

    hub_timeout_s: float = 600.0
    """Seconds that a download from the hub may take."""

    upload_expiry_s: int = LIMITS.upload_expiry_s
    """Seconds without a new chunk after which an upload is forgotten."""

    versions_kept: int = LIMITS.versions_kept
    """Versions of a name that stay available to roll back to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.backend_url
        check_positive(self, "ram_bytes", "builders", "max_weights_bytes", "upload_expiry_s")
        check_positive(self, "hub_timeout_s")
        check_positive(
            self, "versions_kept", *(f"tenant_{each.name}" for each in fields(TenantLimits))
        )

    @property
    def backend_url(self) -> BackendUrl:
        """Raises ValueError for one that is malformed."""
        return BackendUrl.parse(
            self.backend,
            password_file=self.redis_password_file,
            ca_file=self.redis_ca_file,
            scratch_dir=self.scratch_dir,
        )

    @property
    def limits(self) -> Limits:
        """Raises ValueError naming what is wrong in the limits file."""
        tenant = TenantLimits(
            **{each.name: getattr(self, f"tenant_{each.name}") for each in fields(TenantLimits)}
        )
        path = self.limits_file
        return Limits(
            max_weights_bytes=self.max_weights_bytes,
            upload_expiry_s=self.upload_expiry_s,
            versions_kept=self.versions_kept,
            tenant=tenant,
            tenants={} if path is None else read_tenant_limits(path, tenant),
        )

    def finite_in(self, base_model: BaseModel) -> Dtype:
        """The type of the finite check; for a model that tells none, bf16."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        config = base_model.config
        return MODEL_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), Dtype.BF16)
