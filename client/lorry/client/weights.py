"""An adapter's directory as PEFT saves it, read for an upload."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorry.rpc.protocol import MAX_CHUNK_BYTES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


class Piece(NamedTuple):
    """Consecutive bytes of the weights, at most MAX_CHUNK_BYTES."""

    offset: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFiles:
    """The two files of an adapter; the weights are read in pieces, never whole."""

    config_json: str
    weights: Path
    weights_bytes: int
    weights_sha256: bytes

    @classmethod
    async def read(cls, directory: Path) -> "AdapterFiles":
        """Raises ValueError that names the file that is missing."""
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise ValueError(
                    f"{directory} holds no {name}; push a directory that peft's "
                    "save_pretrained wrote with safe_serialization"
                )
        return await asyncio.to_thread(cls._read, directory)

    @classmethod
    def _read(cls, directory: Path) -> "AdapterFiles":
        weights = directory / WEIGHTS_NAME
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return cls(
                config_json=(directory / CONFIG_NAME).read_text(),
                weights=weights,
                weights_bytes=file.tell(),
                weights_sha256=digest,
            )

    def pieces(self, offset: int) -> Iterator[Piece]:
        """The weights from `offset` on; blocks while it reads."""
        with self.weights.open("rb") as file:
            file.seek(offset)
            while data := file.read(MAX_CHUNK_BYTES):
                yield Piece(offset, data)
                offset += len(data)
