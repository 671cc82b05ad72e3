"""What the store knows of adapters, versions and uploads. All immutable; times are Unix time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from lorry.adapter_store.lora import LoraSpec
from lorry.rpc.names import AdapterName

# In JSON these are in hex.
VERSION_DIGESTS = ("digest", "weights_sha256", "config_sha256")
UPLOAD_DIGESTS = ("weights_sha256", "config_sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable content, as it was uploaded to one name."""

    digest: bytes
    max_rank: int
    modules: tuple[str, ...]
    weights_bytes: int  # of all tensors
    file_bytes: int  # of the safetensors file
    upload: str  # key of the upload that brought it
    create_time_ns: int
    weights_sha256: bytes = b""  # of the safetensors file
    config_sha256: bytes = b""  # of adapter_config.json as it was uploaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A name, the version that it points to, and those it may be rolled back to."""

    name: AdapterName
    published: bytes
    versions: tuple[Version, ...]  # newest first
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    create_time_ns: int
    update_time_ns: int
    etag: str

    @property
    def published_version(self) -> Version:
        return next(v for v in self.versions if v.digest == self.published)


class Published(NamedTuple):
    """What an upload has become."""

    version: Version
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the catalogue: what a name is from this revision on."""

    revision: int
    name: AdapterName
    adapter: Adapter | None  # None: deleted
    commit: str = ""  # which commit made it, where several stores write


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord:
    """What an upload promised when it began."""

    key: str  # sha256 of the upload id, which only the client keeps
    name: AdapterName
    spec: LoraSpec
    weights_bytes: int
    weights_sha256: bytes
    labels: Mapping[str, str]
    expected_etag: str
    create_time_ns: int
    config_sha256: bytes = b""


@dataclass(frozen=True, slots=True)
class Content:
    """What a backend keeps of a version beside its weights."""

    spec: LoraSpec
    file_crc32c: int  # of the safetensors file


def adapter_to_json(adapter: Adapter) -> dict[str, Any]:
    return asdict(adapter) | {
        "name": list(adapter.name),
        "published": adapter.published.hex(),
        "versions": [_in_hex(asdict(v), VERSION_DIGESTS) for v in adapter.versions],
    }


def adapter_from_json(fields: Mapping[str, Any]) -> Adapter:
    versions = [
        Version(**{**_from_hex(v, VERSION_DIGESTS), "modules": tuple(v["modules"])})
        for v in fields["versions"]
    ]
    return Adapter(
        **{
            **fields,
            "name": AdapterName(*fields["name"]),
            "published": bytes.fromhex(fields["published"]),
            "versions": tuple(versions),
        }
    )


def upload_to_json(upload: UploadRecord) -> dict[str, Any]:
    return _in_hex(asdict(upload), UPLOAD_DIGESTS) | {
        "name": list(upload.name),
        "spec": upload.spec.to_json(),
    }


def upload_from_json(fields: Mapping[str, Any]) -> UploadRecord:
    return UploadRecord(
        **{
            **_from_hex(fields, UPLOAD_DIGESTS),
            "name": AdapterName(*fields["name"]),
            "spec": LoraSpec.from_json(fields["spec"]),
        }
    )


def _in_hex(fields: Mapping[str, Any], digests: Sequence[str]) -> dict[str, Any]:
    return {**fields, **{key: fields[key].hex() for key in digests}}


def _from_hex(fields: Mapping[str, Any], digests: Sequence[str]) -> dict[str, Any]:
    return {**fields, **{key: bytes.fromhex(fields[key]) for key in digests if key in fields}}
