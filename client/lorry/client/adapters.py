"""Adapters in the store: push, list, show, change and delete."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from lorry.client.adapter import Adapter, AdapterVersion
from lorry.client.generation import adapter_name
from lorry.client.retry import RetryPolicy, retrying, typed
from lorry.client.upload import Progress, send
from lorry.client.weights import AdapterFiles, default_id
from lorry.rpc.channel import Credentials, open_blocking_channel
from lorry.rpc.errors import AdapterNotFound, EtagMismatch
from lorry.rpc.names import check_id
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub

UPLOAD_TIMEOUT_S = 3600.0
Response = TypeVar("Response")


class Adapters:
    """The adapters of the caller's tenant; names may be ids, adapters/ID or full names."""

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        *,
        credentials: Credentials,
        timeout_s: float,
        retry: RetryPolicy,
    ) -> None:
        self._address = address
        self._stub = AdapterServiceStub(channel)
        self._credentials = credentials
        self._metadata = credentials.read_metadata()
        self._timeout_s = timeout_s
        self._retry = retry

    async def show(self, name: str) -> Adapter:
        request = pb.GetAdapterRequest(name=adapter_name(name))
        response = await self._retrying(
            lambda _, remaining_s: self._stub.GetAdapter(request, timeout=remaining_s)
        )
        return Adapter.from_proto(response.adapter)

    async def list(self, *, filter: str = "", page_size: int = 100) -> AsyncIterator[Adapter]:
        """By name. `filter` is `labels.KEY="VALUE"` and `method=LORA`, joined by AND."""
        request = pb.ListAdaptersRequest(filter=filter, page_size=page_size)
        while True:
            response = await self._retrying(
                lambda _, remaining_s: self._stub.ListAdapters(request, timeout=remaining_s)
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
            return await self._stub.DeleteAdapter(request, timeout=remaining_s)

        await self._retrying(call)

    async def push(
        self,
        path: Path,
        *,
        config: Path | None = None,
        adapter_id: str | None = None,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> Adapter:
        """Upload and publish what PEFT saved; returns once it is durable and can be called.

        `path` is a directory, or a safetensors file whose config is `config` or lies beside it;
        its name is the `adapter_id` unless that is given. Without `replace` the name must be new.
        After a broken connection the upload goes on where the store's bytes end.
        """
        adapter_id = check_id(adapter_id or default_id(path), field="adapter_id")
        files = await AdapterFiles.read(path, config=config)
        return await self.push_files(
            adapter_id,
            files,
            replace=replace,
            labels=labels,
            progress=progress,
            timeout_s=timeout_s,
        )

    async def push_files(
        self,
        adapter_id: str,
        files: AdapterFiles,
        *,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> Adapter:
        """`push` of files that have been read."""
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

    async def find_same(self, adapter_id: str, files: AdapterFiles) -> Adapter | None:
        """The adapter of this id if what it publishes was uploaded from the very same files."""
        with contextlib.suppress(AdapterNotFound):
            known = await self.show(adapter_id)
            digests = (files.weights_sha256.hex(), files.config_sha256.hex())
            return known if (known.weights_sha256, known.config_sha256) == digests else None
        return None

    async def versions(self, name: str) -> Sequence[AdapterVersion]:
        """What the name has pointed to and can be rolled back to, newest first."""
        request = pb.ListAdapterVersionsRequest(name=adapter_name(name), page_size=1000)
        response = await self._retrying(
            lambda _, remaining_s: self._stub.ListAdapterVersions(request, timeout=remaining_s)
        )
        return [AdapterVersion.from_proto(message) for message in response.versions]

    async def update(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        description: str | None = None,
        version: str | None = None,
    ) -> Adapter:
        """Change what is given; `version`, in hex, publishes one of `versions`.

        Raises EtagMismatch if somebody else changes the adapter meanwhile. An answer that was lost
        on the way does not make a retry fail.
        """
        known = await self.show(name)
        fields = {"labels": labels, "description": description, "version": version}
        request = pb.UpdateAdapterRequest(
            adapter=pb.Adapter(
                name=known.name,
                etag=known.etag,
                labels=labels,
                description=description or "",
                version=bytes.fromhex(version or ""),
            ),
            update_mask=FieldMask(paths=[key for key in fields if fields[key] is not None]),
        )
        updated = await self._retrying(
            lambda attempt, remaining_s: self._update(request, attempt, remaining_s)
        )
        return Adapter.from_proto(updated)

    async def _update(
        self, request: pb.UpdateAdapterRequest, attempt: int, remaining_s: float
    ) -> pb.Adapter:
        """One attempt; that the etag has changed may be an earlier one's doing."""
        try:
            return (await self._stub.UpdateAdapter(request, timeout=remaining_s)).adapter
        except grpc.RpcError as error:
            if not attempt or not isinstance(typed(error), EtagMismatch):
                raise
            known = pb.GetAdapterRequest(name=request.adapter.name)
            found = (await self._stub.GetAdapter(known, timeout=remaining_s)).adapter
            if not _is_updated(found, request):
                raise
            return found

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
            lambda _, remaining_s: self._stub.CreateUpload(request, timeout=remaining_s)
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
                pb.GetUploadRequest(upload_id=upload_id), timeout=remaining_s
            )
            start.offset = state.received_bytes
        with open_blocking_channel(self._address, self._credentials) as channel:
            return await send(
                channel,
                start,
                files,
                progress=progress,
                timeout_s=remaining_s,
                metadata=self._metadata(),
            )

    async def _retrying(self, call: Callable[[int, float], Awaitable[Response]]) -> Response:
        return await retrying(call, policy=self._retry, timeout_s=self._timeout_s)


def _is_updated(adapter: pb.Adapter, request: pb.UpdateAdapterRequest) -> bool:
    """Whether the update would leave the adapter as it is."""
    after = pb.Adapter()
    after.CopyFrom(adapter)
    request.update_mask.MergeMessage(request.adapter, after, replace_repeated_field=True)
    return after == adapter


def _silent(sent_bytes: int, total_bytes: int) -> None:
    pass
