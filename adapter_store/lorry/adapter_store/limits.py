"""What each tenant may have, and what one adapter may be."""

from collections.abc import Iterable
from dataclasses import dataclass

from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.records import UploadRecord
from lorry.rpc.errors import InvalidRequest, TenantLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_weights_bytes: int = 4 << 30  # of one adapter
    tenant_uploads: int = 64  # under way at once
    tenant_adapters: int = 20_000
    tenant_bytes: int = 1 << 40  # of all versions and uploads
    upload_expiry_s: int = 3600
    versions_kept: int = 8  # of a name, to roll back to

    def check(
        self, new: UploadRecord, under_way: Iterable[UploadRecord], catalogue: Catalogue
    ) -> None:
        """Raise InvalidRequest or TenantLimit if the upload may not begin.

        Counts what the tenant itself has uploaded, whether or not others have the same content.
        """
        if not 0 < new.weights_bytes <= self.max_weights_bytes:
            raise InvalidRequest.of(
                "weights_bytes",
                f"must be in [1, {self.max_weights_bytes}], got {new.weights_bytes}",
            )
        uploads = [u for u in under_way if u.name.tenant == new.name.tenant]
        adapters = catalogue.of_tenant(new.name.tenant)
        stored = sum(v.weights_bytes for adapter in adapters for v in adapter.versions)
        names = {adapter.name for adapter in adapters} | {u.name for u in uploads} | {new.name}
        promised = sum(u.weights_bytes for u in uploads) + new.weights_bytes
        _check("uploads", len(uploads) + 1, self.tenant_uploads)
        _check("adapters", len(names), self.tenant_adapters)
        _check("bytes", stored + promised, self.tenant_bytes)


def _check(what: str, wanted: int, limit: int) -> None:
    if wanted > limit:
        raise TenantLimit(
            f"the tenant may have {limit} {what}, this would be {wanted}",
            limit=limit,
            wanted=wanted,
            what=what,
        )
