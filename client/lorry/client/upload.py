"""Sending an adapter's weights to the store.

It uses gRPC's blocking API, whose threads read the file and write the stream. When a server ends a
stream that is being written, the asyncio API may hide the server's status behind INTERNAL
(grpc/grpc issue 36066), and a broken connection could not be told from a refusal.
"""

import asyncio
from collections.abc import Callable, Iterator

import grpc
from crc32c import crc32c

from lorry.client.weights import AdapterFiles
from lorry.rpc.renewed_channel import Metadata
from lorry.rpc.weight_chunk import Chunk, upload_adapter
from lorry.v1.adapter_service_pb2 import UploadAdapterRequest, UploadAdapterResponse, UploadStart

Progress = Callable[[int, int], None]  # bytes sent, bytes in all


async def send(
    channel: grpc.Channel,
    start: UploadStart,
    files: AdapterFiles,
    *,
    progress: Progress,
    timeout_s: float,
    metadata: Metadata,
) -> UploadAdapterResponse:
    """Send the weights from `start.offset` on; `progress` is called by the event loop."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def requests() -> Iterator[Chunk | UploadAdapterRequest]:
        yield UploadAdapterRequest(start=start)
        for piece in files.pieces(start.offset):
            loop.call_soon_threadsafe(progress, piece.offset, files.weights_bytes)
            yield Chunk(piece.offset, piece.data, crc32c(piece.data))

    def on_end(_: object) -> None:
        loop.call_soon_threadsafe(ended.set)

    call = upload_adapter(channel).future(requests(), timeout=timeout_s, metadata=metadata)
    call.add_done_callback(on_end)
    try:
        await ended.wait()
        response: UploadAdapterResponse = call.result()
    finally:
        call.cancel()
    progress(files.weights_bytes, files.weights_bytes)
    return response
