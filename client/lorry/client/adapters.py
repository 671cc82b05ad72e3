"""Adapters in the store: push, list, show and delete."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import grpc.aio

from lorry.client.generation import adapter_name
from lorry.client.retry import RetryPolicy, retrying
from lorry.client.upload import Progress, send
from lorry.client.weights import AdapterFiles
from lorry.rpc.channel import Metadata, open_blocking_channel
from lorry.rpc.errors import AdapterNotFound
from lorry.rpc.names import check_id
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub

UPLOAD_TIMEOUT_S = 3600.0
Response = TypeVar("Response")


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
        )


class Adapters:
    """The adapters of the caller's tenant; names may be ids, adapters/ID or full names."""

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        *,
        metadata: Metadata,
        timeout_s: float,
        retry: RetryPolicy,
    ) -> None:
        self._address = address
        self._stub = AdapterServiceStub(channel)
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._retry = retry

    async def show(self, name: str) -> Adapter:
        request = pb.GetAdapterRequest(name=adapter_name(name))
        response = await self._retrying(
            lambda _, remaining_s: self._stub.GetAdapter(
                request, timeout=remaining_s, metadata=self._metadata
            )
        )
        return Adapter.from_proto(response.adapter)

    async def list(self, *, filter: str = "", page_size: int = 100) -> AsyncIterator[Adapter]:
        """By name. `filter` is `labels.KEY="VALUE"` and `method=LORA`, joined by AND."""
        request = pb.ListAdaptersRequest(filter=filter, page_size=page_size)
        while True:
            response = await self._retrying(
                lambda _, remaining_s: self._stub.ListAdapters(
                    request, timeout=remaining_s, metadata=self._metadata
                )
            )
            for message in response.adapters:
                yield Adapter.from_proto(message)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Remove a name. An answer that was lost on the way does not make a retry fail."""
        request = pb.DeleteAdapterRequest(name=adapter_name(name), allow_missing=missing_ok)

        async def call(attempt: int, remaining_s: float) -> pb.DeleteAdapterResponse:
            request.allow_missing = missing_ok or attempt > 0
            return await self._stub.DeleteAdapter(
                request, timeout=remaining_s, metadata=self._metadata
            )

        await self._retrying(call)

    async def push(
        self,
        directory: Path,
        *,
        adapter_id: str | None = None,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> Adapter:
        """Upload a PEFT directory and publish it; returns once it is durable and can be called.

        `adapter_id` is the directory's name unless given. Without `replace` the name must be new.
        After a broken connection the upload goes on where the store's bytes end.
        """
        adapter_id = check_id(adapter_id or default_id(directory), field="adapter_id")
        files = await AdapterFiles.read(directory)
        etag = await self._etag(adapter_id) if replace else ""
        upload_id = await self._create_upload(adapter_id, files, etag, labels or {})
        response = await retrying(
            lambda attempt, remaining_s: self._send(
                upload_id, files, progress or _silent, attempt, remaining_s
            ),
            policy=self._retry,
            timeout_s=timeout_s,
        )
        return Adapter.from_proto(response.adapter)

    async def _etag(self, adapter_id: str) -> str:
        """Of the adapter that a push replaces; empty if there is none."""
        with contextlib.suppress(AdapterNotFound):
            return (await self.show(adapter_id)).etag
        return ""

    async def _create_upload(
        self, adapter_id: str, files: AdapterFiles, etag: str, labels: Mapping[str, str]
    ) -> str:
        request = pb.CreateUploadRequest(
            adapter_id=adapter_id,
            config_json=files.config_json,
            weights_bytes=files.weights_bytes,
            weights_sha256=files.weights_sha256,
            labels=labels,
            expected_etag=etag,
        )
        response = await self._retrying(
            lambda _, remaining_s: self._stub.CreateUpload(
                request, timeout=remaining_s, metadata=self._metadata
            )
        )
        return response.upload_id

    async def _send(
        self,
        upload_id: str,
        files: AdapterFiles,
        progress: Progress,
        attempt: int,
        remaining_s: float,
    ) -> pb.UploadAdapterResponse:
        """One attempt; all but the first continue where the store's bytes end."""
        start = pb.UploadStart(upload_id=upload_id)
        if attempt:
            state = await self._stub.GetUpload(
                pb.GetUploadRequest(upload_id=upload_id),
                timeout=remaining_s,
                metadata=self._metadata,
            )
            start.offset = state.received_bytes
        with open_blocking_channel(self._address) as channel:
            return await send(
                AdapterServiceStub(channel),
                start,
                files,
                progress=progress,
                timeout_s=remaining_s,
                metadata=self._metadata,
            )

    async def _retrying(self, call: Callable[[int, float], Awaitable[Response]]) -> Response:
        return await retrying(call, policy=self._retry, timeout_s=self._timeout_s)


def default_id(directory: Path) -> str:
    """The id under which a directory is pushed unless another is given."""
    return directory.resolve().name


def _silent(sent_bytes: int, total_bytes: int) -> None:
    pass
