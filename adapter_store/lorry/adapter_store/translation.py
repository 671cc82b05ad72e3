"""Between protobuf messages and what the store knows."""

from collections.abc import AsyncIterator

from google.protobuf.timestamp_pb2 import Timestamp

from lorry.adapter_store import edits
from lorry.adapter_store.catalogue import WatchUpdate
from lorry.adapter_store.image import ImageHeader
from lorry.adapter_store.records import Adapter, Change, Published, Version
from lorry.rpc.errors import InvalidRequest
from lorry.rpc.labels import check_labels
from lorry.rpc.names import check_sha256
from lorry.rpc.weight_chunk import Chunk
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1 import catalogue_service_pb2 as catalogue_pb

UPDATABLE = frozenset({"labels", "description", "version"})


def adapter_to_proto(adapter: Adapter) -> pb.Adapter:
    return pb.Adapter(
        name=str(adapter.name),
        method=pb.Adapter.METHOD_LORA,
        version=adapter.published,
        published=version_to_proto(adapter.published_version),
        labels=dict(adapter.labels),
        description=adapter.description,
        create_time=timestamp(adapter.create_time_ns),
        update_time=timestamp(adapter.update_time_ns),
        etag=adapter.etag,
    )


def version_to_proto(version: Version) -> pb.AdapterVersion:
    return pb.AdapterVersion(
        digest=version.digest,
        max_rank=version.max_rank,
        modules=version.modules,
        state=pb.AdapterVersion.STATE_READY,
        weights_bytes=version.weights_bytes,
        create_time=timestamp(version.create_time_ns),
        weights_sha256=version.weights_sha256,
        config_sha256=version.config_sha256,
    )


def published_upload_to_proto(published: Published) -> pb.GetUploadResponse:
    return pb.GetUploadResponse(
        received_bytes=published.version.file_bytes, adapter=adapter_to_proto(published.adapter)
    )


def update_from_proto(request: pb.UpdateAdapterRequest) -> edits.Update:
    """The fields that the mask names."""
    paths = set(request.update_mask.paths)
    if not paths or paths - UPDATABLE:
        raise InvalidRequest.of(
            "update_mask", f"must name some of {sorted(UPDATABLE)}, got {sorted(paths)}"[:300]
        )
    adapter = request.adapter
    check_labels(adapter.labels)
    edits.check_description(adapter.description)
    return edits.Update(
        labels=dict(adapter.labels) if "labels" in paths else None,
        description=adapter.description if "description" in paths else None,
        published=check_sha256(adapter.version, field="adapter.version")
        if "version" in paths
        else None,
    )


def watch_update_to_proto(
    update: WatchUpdate, store_id: str
) -> catalogue_pb.WatchCatalogueResponse:
    return catalogue_pb.WatchCatalogueResponse(
        store_id=store_id,
        revision=update.revision,
        events=[_event(change) for change in update.changes],
        snapshot_complete=update.snapshot_complete,
    )


def header_to_proto(
    header: ImageHeader, version: bytes, layout: data_pb.PageLayout
) -> data_pb.ImageHeader:
    return data_pb.ImageHeader(
        version=version,
        layout=layout,
        rank=header.rank,
        pages=header.pages,
        image_bytes=header.image_bytes,
        image_crc32c=header.crc32c,
        modules=[
            data_pb.Module(
                name=module.name,
                row_offset=module.row_offset,
                b_row_offset=module.b_row_offset,
                scale_per_layer=module.scale_per_layer,
            )
            for module in header.modules
        ],
    )


async def only_chunks(
    requests: AsyncIterator[Chunk | pb.UploadAdapterRequest],
) -> AsyncIterator[Chunk]:
    """The chunks after the start of an upload."""
    async for request in requests:
        if not isinstance(request, Chunk):
            raise InvalidRequest.of("payload", "must be a chunk after the first message")
        yield request


def timestamp(time_ns: int) -> Timestamp:
    result = Timestamp()
    result.FromNanoseconds(time_ns)
    return result


def _event(change: Change) -> catalogue_pb.AdapterEvent:
    if change.adapter is None:
        return catalogue_pb.AdapterEvent(
            type=catalogue_pb.AdapterEvent.TYPE_DELETED, adapter=pb.Adapter(name=str(change.name))
        )
    return catalogue_pb.AdapterEvent(
        type=catalogue_pb.AdapterEvent.TYPE_UPSERTED, adapter=adapter_to_proto(change.adapter)
    )
