"""Weights on their way: the two methods that carry them, without protobuf's copies of each MiB.

Protobuf copies the bytes of a message when they are set, written, parsed and read, each time with
Python's lock held. Here a chunk is written by one copy, and read as a view of the message. What
travels is the very message of the schema, and any other form of it is left to protobuf.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio

from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb

ADAPTER_SERVICE, UPLOAD_ADAPTER = "lorry.v1.AdapterService", "UploadAdapter"
DATA_SERVICE, FETCH_ADAPTER = "lorry.v1.AdapterDataService", "FetchAdapter"
# Field numbers and wire types: of `chunk` in both messages, then of WeightChunk.
CHUNK, OFFSET, DATA, CRC32C = b"\x12", b"\x08", b"\x12", b"\x1d"
CRC_BYTES = 5  # with its tag
MAX_VARINT_BYTES = 10
Message = pb.UploadAdapterRequest | data_pb.FetchAdapterResponse


class Chunk(NamedTuple):
    """A WeightChunk."""

    offset: int
    data: bytes | memoryview
    crc32c: int  # as its sender says


def encode_chunk(chunk: Chunk) -> bytes:
    """The message, UploadAdapterRequest or FetchAdapterResponse, that carries a chunk."""
    num_bytes = len(chunk.data)
    fields = OFFSET + _varint(chunk.offset) + DATA + _varint(num_bytes)
    head = CHUNK + _varint(len(fields) + num_bytes + CRC_BYTES) + fields
    return b"".join((head, chunk.data, CRC32C, struct.pack("<I", chunk.crc32c)))


def decode_chunk(message: bytes) -> Chunk | None:
    """The chunk of a message in the form that `encode_chunk` and protobuf write; else None."""
    try:
        return _decode(message)
    except IndexError:  # it ends too early
        return None


def parser(message_type: Callable[[], Any]) -> Callable[[bytes], Any]:
    """Parses messages: each is a `Chunk`, or one of `message_type` that carries something else."""

    def parse(data: bytes) -> Any:
        chunk = decode_chunk(data)
        if chunk is not None:
            return chunk
        message: Any = message_type()
        message.ParseFromString(data)
        if message.WhichOneof("payload") == "chunk":
            return Chunk(message.chunk.offset, message.chunk.data, message.chunk.crc32c)
        return message

    return parse


def serialize(message: Message | Chunk | bytes) -> bytes:
    """Bytes are what `encode_chunk` made."""
    if isinstance(message, Chunk):
        return encode_chunk(message)
    return message if isinstance(message, bytes) else message.SerializeToString()


def fetch_adapter(channel: grpc.aio.Channel) -> Any:
    """`AdapterDataService.FetchAdapter` of a channel; it gives Chunks and other responses."""
    return channel.unary_stream(
        f"/{DATA_SERVICE}/{FETCH_ADAPTER}",
        request_serializer=data_pb.FetchAdapterRequest.SerializeToString,
        response_deserializer=parser(data_pb.FetchAdapterResponse),
    )


def upload_adapter(channel: Any) -> Any:
    """`AdapterService.UploadAdapter` of a channel, blocking or not; it takes what `serialize`
    does."""
    return channel.stream_unary(
        f"/{ADAPTER_SERVICE}/{UPLOAD_ADAPTER}",
        request_serializer=serialize,
        response_deserializer=pb.UploadAdapterResponse.FromString,
    )


def add_chunk_methods(server: grpc.aio.Server, *, upload: Any, fetch: Any) -> None:
    """Have a server that serves both services already carry chunks like this."""
    uploading = grpc.stream_unary_rpc_method_handler(
        upload,
        request_deserializer=parser(pb.UploadAdapterRequest),
        response_serializer=pb.UploadAdapterResponse.SerializeToString,
    )
    fetching = grpc.unary_stream_rpc_method_handler(
        fetch,
        request_deserializer=data_pb.FetchAdapterRequest.FromString,
        response_serializer=serialize,
    )
    server.add_registered_method_handlers(ADAPTER_SERVICE, {UPLOAD_ADAPTER: uploading})
    server.add_registered_method_handlers(DATA_SERVICE, {FETCH_ADAPTER: fetching})


def _decode(message: bytes) -> Chunk | None:
    if message[:1] != CHUNK:
        return None
    inner_bytes, at = _read_varint(message, 1)
    end = at + inner_bytes
    offset = 0
    if message[at : at + 1] == OFFSET:
        offset, at = _read_varint(message, at + 1)
    if message[at : at + 1] != DATA:
        return None
    num_bytes, at = _read_varint(message, at + 1)
    data_end = at + num_bytes
    is_whole = len(message) == end == data_end + CRC_BYTES
    if not is_whole or message[data_end : data_end + 1] != CRC32C or offset >> 64:
        return None
    (checksum,) = struct.unpack_from("<I", message, data_end + 1)
    return Chunk(offset, memoryview(message)[at:data_end], checksum)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; IndexError if it does not."""
    value = 0
    for place in range(MAX_VARINT_BYTES):
        byte = data[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte <= 0x7F:
            return value, at + place + 1
    raise IndexError
