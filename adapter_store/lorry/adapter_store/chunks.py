"""Pieces of images on their way out."""

from crc32c import crc32c

from lorry.adapter_store.leases import Lease
from lorry.rpc.huge_pages import map_file
from lorry.rpc.weight_chunk import Chunk, encode_chunk


def mapped(lease: Lease) -> memoryview:
    """The image, until the lease ends, whoever still refers to it then."""
    with lease.path.open("rb", buffering=0) as file:
        content = map_file(file.fileno(), lease.header.image_bytes)
    lease.then(content.release)
    return content


def chunk_message(content: memoryview, offset: int, num_bytes: int) -> bytes:
    """The message with the chunk of an image that begins at `offset`.

    A MiB takes less than the way to a thread and back.
    """
    with content[offset : offset + num_bytes] as data:
        return encode_chunk(Chunk(offset, data, crc32c(data)))
