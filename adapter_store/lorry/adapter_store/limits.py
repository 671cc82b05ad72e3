"""What each tenant may have, and what one adapter may be."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.records import UploadRecord
from lorry.kernels.page_layout import MAX_RANK
from lorry.rpc.errors import InvalidRequest, TenantLimit
from lorry.rpc.names import AdapterName, check_id


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """Of one tenant."""

    uploads: int = 64  # under way at once
    adapters: int = 20_000
    bytes: int = 1 << 40  # of all versions and uploads
    rank: int = MAX_RANK  # of an adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_weights_bytes: int = 4 << 30  # of one adapter
    upload_expiry_s: int = 3600
    versions_kept: int = 8  # of a name, to roll back to
    tenant: TenantLimits = field(default_factory=TenantLimits)  # where `tenants` has no other
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)

    def of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.tenant)

    def check(
        self,
        name: AdapterName,
        weights_bytes: int,
        under_way: Iterable[UploadRecord],
        catalogue: Catalogue,
    ) -> None:
        """Raise InvalidRequest or TenantLimit if an upload may not begin, whatever its rank.

        Counts what the tenant itself has uploaded, whether or not others have the same content.
        """
        if not 0 < weights_bytes <= self.max_weights_bytes:
            raise InvalidRequest.of(
                "weights_bytes", f"must be in [1, {self.max_weights_bytes}], got {weights_bytes}"
            )
        limits, tenant = self.of(name.tenant), name.tenant
        uploads = [u for u in under_way if u.name.tenant == tenant]
        begun = {name, *(u.name for u in uploads)}
        new_names = sum(catalogue.get(each) is None for each in begun)
        promised = sum(u.weights_bytes for u in uploads) + weights_bytes
        self.check_uploads(tenant, len(uploads) + 1)
        _check("adapters", catalogue.adapters_of(tenant) + new_names, limits.adapters)
        _check("bytes", catalogue.bytes_of(tenant) + promised, limits.bytes)

    def check_uploads(self, tenant: str, num_uploads: int) -> None:
        """Raise TenantLimit if the tenant may not have so many under way."""
        _check("uploads", num_uploads, self.of(tenant).uploads)

    def check_rank(self, tenant: str, rank: int) -> None:
        """Raise TenantLimit if no adapter of the tenant may have this rank."""
        _check("rank", rank, self.of(tenant).rank)


def read_tenant_limits(path: Path, default: TenantLimits) -> dict[str, TenantLimits]:
    """``{"tenants": {ID: {"uploads": 8, "adapters": 100, "bytes": 1000000000, "rank": 64}}}``.

    What an entry leaves out is as in `default`. Raises ValueError naming what is wrong.
    """
    try:
        entries = json.loads(path.read_text())["tenants"]
        return {
            check_id(tenant, field="tenant"): _tenant_limits(tenant, entry, default)
            for tenant, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise ValueError(f"limits file {path}: {error}") from error


def _tenant_limits(tenant: str, entry: Mapping[str, int], default: TenantLimits) -> TenantLimits:
    known = [each.name for each in fields(TenantLimits)]
    for name, value in entry.items():
        if name not in known:
            raise ValueError(f"{tenant}.{name} is none of {', '.join(known)}")
        if type(value) is not int or value < 0:
            raise ValueError(f"{tenant}.{name} must be a number of at least 0, got {value!r}")
    return replace(default, **entry)


def _check(what: str, wanted: int, limit: int) -> None:
    if wanted > limit:
        raise TenantLimit(
            f"{what}: the tenant may have {limit}, this would be {wanted}",
            limit=limit,
            wanted=wanted,
            what=what,
        )
