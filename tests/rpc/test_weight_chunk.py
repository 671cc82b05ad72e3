"""A chunk on the wire is the message of the schema, whoever writes and whoever reads it."""

import random

import pytest

from lorry.rpc.weight_chunk import Chunk, Message, decode_chunk, encode_chunk, parser, serialize
from lorry.v1 import adapter_data_service_pb2 as data_pb
from lorry.v1 import adapter_service_pb2 as pb
from lorry.v1.common_pb2 import WeightChunk

MESSAGES = (pb.UploadAdapterRequest, data_pb.FetchAdapterResponse)
CHUNKS = [
    Chunk(offset, bytes(num_bytes), checksum)
    for offset in (0, 1, 127, 128, 1 << 20, (1 << 64) - 1)
    for num_bytes in (0, 1, 127, 128, 300, 1 << 20)
    for checksum in (0, 1, 0xFFFFFFFF)
]


def as_message(message_type: type[Message], chunk: Chunk) -> Message:
    fields = WeightChunk(offset=chunk.offset, data=bytes(chunk.data), crc32c=chunk.crc32c)
    return message_type(chunk=fields)


@pytest.mark.parametrize("message_type", MESSAGES)
def test_protobuf_reads_what_is_written_and_the_other_way_round(
    message_type: type[Message],
) -> None:
    parse = parser(message_type)
    for chunk in CHUNKS:
        message = as_message(message_type, chunk)
        assert message_type.FromString(encode_chunk(chunk)) == message
        assert encode_chunk(chunk) == serialize(chunk)
        for data in (encode_chunk(chunk), message.SerializeToString()):
            assert parse(data) == chunk


def test_a_chunk_is_read_without_a_copy() -> None:
    message = encode_chunk(CHUNKS[-1])
    decoded = decode_chunk(message)
    assert decoded is not None
    assert isinstance(decoded.data, memoryview)
    assert decoded.data.obj is message


def test_other_messages_are_left_to_protobuf() -> None:
    start = pb.UploadAdapterRequest(start=pb.UploadStart(upload_id="x", offset=7))
    assert parser(pb.UploadAdapterRequest)(serialize(start)) == start
    header = data_pb.FetchAdapterResponse(header=data_pb.ImageHeader(rank=8))
    assert parser(data_pb.FetchAdapterResponse)(serialize(header)) == header
    chunk = Chunk(1, b"abc", 2)
    twice = encode_chunk(Chunk(5, b"x", 9)) + encode_chunk(chunk)  # the last one's fields count
    assert decode_chunk(twice) is None
    assert parser(pb.UploadAdapterRequest)(twice) == chunk


def test_damaged_messages_are_read_as_protobuf_reads_them() -> None:
    """Either not at all here, or to the same chunk."""
    generator = random.Random(7)
    whole = encode_chunk(Chunk(1 << 20, bytes(range(200)), 0x12345678))
    num_decoded = 0
    for _ in range(5_000):
        message = bytearray(whole[: generator.choice((len(whole), generator.randrange(300)))])
        for _ in range(generator.randrange(3)):
            if message:
                message[generator.randrange(min(len(message), 12))] = generator.randrange(256)
        decoded = decode_chunk(bytes(message))
        if decoded is not None:
            num_decoded += 1
            parsed = pb.UploadAdapterRequest.FromString(bytes(message)).chunk
            assert Chunk(parsed.offset, parsed.data, parsed.crc32c) == decoded
    assert num_decoded > 1_000


def test_a_number_that_does_not_end_is_refused() -> None:
    assert decode_chunk(b"\x12" + b"\xff" * 100) is None
    assert decode_chunk(b"\x12" + b"\xff" * 3) is None
    assert decode_chunk(b"") is None
