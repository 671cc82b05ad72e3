"""What the store tells of an adapter and of its versions."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from lorry.v1 import adapter_service_pb2 as pb


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A name and the version it points to."""

    name: str  # tenants/ID/adapters/ID
    version: str  # sha256 of config and tensors, in hex
    max_rank: int
    modules: tuple[str, ...]
    weights_bytes: int
    labels: Mapping[str, str]
    description: str
    created: datetime
    updated: datetime
    etag: str
    weights_sha256: str  # of the files it was uploaded from, in hex
    config_sha256: str

    @classmethod
    def from_proto(cls, message: pb.Adapter) -> "Adapter":
        return cls(
            name=message.name,
            version=message.version.hex(),
            max_rank=message.published.max_rank,
            modules=tuple(message.published.modules),
            weights_bytes=message.published.weights_bytes,
            labels=dict(message.labels),
            description=message.description,
            created=message.create_time.ToDatetime(tzinfo=UTC),
            updated=message.update_time.ToDatetime(tzinfo=UTC),
            etag=message.etag,
            weights_sha256=message.published.weights_sha256.hex(),
            config_sha256=message.published.config_sha256.hex(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterVersion:
    """One immutable content that a name has pointed to."""

    version: str  # in hex
    max_rank: int
    weights_bytes: int
    created: datetime

    @classmethod
    def from_proto(cls, message: pb.AdapterVersion) -> "AdapterVersion":
        return cls(
            version=message.digest.hex(),
            max_rank=message.max_rank,
            weights_bytes=message.weights_bytes,
            created=message.create_time.ToDatetime(tzinfo=UTC),
        )
