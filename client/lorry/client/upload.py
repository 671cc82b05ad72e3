"""Sending an adapter's weights to the store.

It uses gRPC's blocking API, whose threads read the file and write the stream. When a server ends a
stream that is being written, the asyncio API may hide the server's status behind INTERNAL
(grpc/grpc issue 36066), and a broken connection could not be told from a refusal.
"""

import asyncio
from collections.abc import Callable, Iterator

from lorry.client.weights import AdapterFiles
from lorry.rpc.channel import Metadata
from lorry.v1.adapter_service_pb2 import UploadAdapterRequest, UploadAdapterResponse, UploadStart
from lorry.v1.adapter_service_pb2_grpc import AdapterServiceStub

Progress = Callable[[int, int], None]  # bytes sent, bytes in all


async def send(
    stub: AdapterServiceStub,
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

    def requests() -> Iterator[UploadAdapterRequest]:
        yield UploadAdapterRequest(start=start)
        for chunk in files.chunks(start.offset):
            loop.call_soon_threadsafe(progress, chunk.offset, files.weights_bytes)
            yield UploadAdapterRequest(chunk=chunk)

    def on_end(_: object) -> None:
        loop.call_soon_threadsafe(ended.set)

    call = stub.UploadAdapter.future(requests(), timeout=timeout_s, metadata=metadata)
    call.add_done_callback(on_end)
    try:
        await ended.wait()
        response = call.result()
    finally:
        call.cancel()
    progress(files.weights_bytes, files.weights_bytes)
    return response
