"""Publishing what the store itself reads, by the same steps as an upload."""

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple

from crc32c import crc32c

from lorry.adapter_store.peft_config import MAX_CONFIG_BYTES
from lorry.adapter_store.records import Adapter
from lorry.adapter_store.store import Store
from lorry.rpc.errors import AdapterInvalid
from lorry.rpc.names import AdapterName
from lorry.rpc.protocol import MAX_CHUNK_BYTES
from lorry.rpc.weight_chunk import Chunk

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Ingested(NamedTuple):
    adapter: Adapter
    version: bytes
    unchanged: bool  # the name has had these very files before


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter's files, open; links have not been followed."""

    config_json: str
    weights: int  # descriptor
    weights_bytes: int
    weights_sha256: bytes

    @property
    def config_sha256(self) -> bytes:
        return hashlib.sha256(self.config_json.encode()).digest()

    @classmethod
    def open(cls, directory: int, max_weights_bytes: int) -> "Source":
        """Read what a directory's descriptor shows; the caller closes `weights`.

        Blocks. Raises OSError, or AdapterInvalid naming the file.
        """
        config = _open_regular(directory, CONFIG_NAME, MAX_CONFIG_BYTES)
        with os.fdopen(config, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES)
        weights = _open_regular(directory, WEIGHTS_NAME, max_weights_bytes)
        try:
            with os.fdopen(os.dup(weights), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                return cls(content.decode(), weights, file.tell(), digest)
        except UnicodeDecodeError as error:
            os.close(weights)
            raise AdapterInvalid.of(CONFIG_NAME, f"is not UTF-8: {error}") from error
        except BaseException:
            os.close(weights)
            raise

    async def chunks(self) -> AsyncIterator[Chunk]:
        for offset in range(0, self.weights_bytes, MAX_CHUNK_BYTES):
            yield await asyncio.to_thread(self._read_chunk, offset)

    def _read_chunk(self, offset: int) -> Chunk:
        data = os.pread(self.weights, MAX_CHUNK_BYTES, offset)
        return Chunk(offset, data, crc32c(data))


async def ingest(
    store: Store,
    name: AdapterName,
    source: Source,
    *,
    labels: dict[str, str] | None = None,
    replace: bool = True,
) -> Ingested:
    """Publish a source under a name, unless that has had these very files before.

    So a name that was rolled back stays so. Raises what an upload raises.
    """
    known = store.catalogue.get(name)
    digests = (source.weights_sha256, source.config_sha256)
    for version in known.versions if known is not None else ():
        if known is not None and (version.weights_sha256, version.config_sha256) == digests:
            return Ingested(known, version.digest, unchanged=True)
    upload_id, _ = await store.begin_upload(
        name,
        config_json=source.config_json,
        weights_bytes=source.weights_bytes,
        weights_sha256=source.weights_sha256,
        labels=labels or {},
        expected_etag=known.etag if known is not None and replace else "",
    )
    try:
        published = await store.uploads.receive(upload_id, name.tenant, 0, source.chunks())
    except BaseException:
        await store.uploads.abandon(upload_id, name.tenant)
        raise
    return Ingested(published.adapter, published.version.digest, unchanged=False)


def _open_regular(directory: int, name: str, max_bytes: int) -> int:
    """Open a file that is no link, pipe or device and not too large."""
    try:
        descriptor = os.open(name, FLAGS, dir_fd=directory)
    except FileNotFoundError as error:
        raise AdapterInvalid.of(name, "there is none") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise AdapterInvalid.of(name, f"has {status.st_size} bytes, more than {max_bytes}")
    raise AdapterInvalid.of(name, "is not a regular file")
