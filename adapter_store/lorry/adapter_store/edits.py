"""What may happen to a name: pure functions from the adapter before to the adapter after."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from uuid import uuid4

from lorry.adapter_store.records import Adapter, UploadRecord, Version
from lorry.rpc.errors import (
    AdapterExists,
    AdapterNotFound,
    EtagMismatch,
    InvalidRequest,
    VersionNotFound,
)
from lorry.rpc.names import AdapterName

MAX_DESCRIPTION_BYTES = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The fields to change; None leaves a field as it is."""

    labels: Mapping[str, str] | None = None
    description: str | None = None
    published: bytes | None = None


def check_replaceable(
    before: Adapter | None, name: AdapterName, expected_etag: str
) -> Adapter | None:
    """Whether an upload may publish; returns the adapter that it replaces."""
    if not expected_etag and before is not None:
        raise AdapterExists(
            f"{name} exists; expected_etag must name what is replaced", adapter=str(name)
        )
    if expected_etag and before is None:
        raise not_found(name)
    if expected_etag and before is not None:
        check_etag(before, expected_etag)
    return before


def publish(
    before: Adapter | None, upload: UploadRecord, version: Version, *, now_ns: int, kept: int
) -> Adapter:
    """The adapter with `version` as its newest and published one.

    It is returned as it was if this upload has brought that version already.
    """
    if before is not None and any(v.upload == upload.key for v in before.versions):
        return before
    replaced = check_replaceable(before, upload.name, upload.expected_etag)
    if replaced is None:
        return Adapter(
            name=upload.name,
            published=version.digest,
            versions=(version,),
            labels=upload.labels,
            create_time_ns=now_ns,
            update_time_ns=now_ns,
            etag=new_etag(),
        )
    older = tuple(v for v in replaced.versions if v.digest != version.digest)
    return replace(
        replaced,
        published=version.digest,
        versions=(version, *older)[:kept],
        labels=upload.labels or replaced.labels,
        update_time_ns=now_ns,
        etag=new_etag(),
    )


def update(
    before: Adapter | None, name: AdapterName, etag: str, new: Update, now_ns: int
) -> Adapter:
    """The adapter with the fields of `new`."""
    if before is None:
        raise not_found(name)
    check_etag(before, etag)
    if new.published is not None and new.published not in [v.digest for v in before.versions]:
        raise VersionNotFound(f"{name} has no version {new.published.hex()}")
    return replace(
        before,
        labels=before.labels if new.labels is None else new.labels,
        description=before.description if new.description is None else new.description,
        published=before.published if new.published is None else new.published,
        update_time_ns=now_ns,
        etag=new_etag(),
    )


def delete(before: Adapter | None, name: AdapterName, etag: str, *, allow_missing: bool) -> None:
    """Check that the adapter may be deleted."""
    if before is None:
        if not allow_missing:
            raise not_found(name)
    elif etag:
        check_etag(before, etag)


def check_etag(adapter: Adapter, etag: str) -> None:
    if adapter.etag != etag:
        raise EtagMismatch(
            f"{adapter.name} has etag {adapter.etag!r}, not {etag[:200]!r}", etag=adapter.etag
        )


def check_description(description: str) -> None:
    if len(description.encode()) > MAX_DESCRIPTION_BYTES:
        raise InvalidRequest.of("description", f"must have at most {MAX_DESCRIPTION_BYTES} bytes")


def not_found(name: AdapterName) -> AdapterNotFound:
    return AdapterNotFound(f"no adapter {name}", adapter=str(name))


def new_etag() -> str:
    return uuid4().hex
