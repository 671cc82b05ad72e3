"""An adapter as PEFT saves it, read for an upload."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorry.rpc.protocol import MAX_CHUNK_BYTES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SUFFIX = ".safetensors"
WHAT_TO_PUSH = "push what peft's save_pretrained wrote with safe_serialization"


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
    async def read(cls, path: Path, *, config: Path | None = None) -> "AdapterFiles":
        """Of a directory, or of a safetensors file with its config beside it unless `config` is it.

        Raises ValueError that names the file that is missing.
        """
        return await asyncio.to_thread(cls._read, path, config)

    @classmethod
    def _read(cls, path: Path, config: Path | None) -> "AdapterFiles":
        _check_format(path)
        weights = path if path.is_file() else path / WEIGHTS_NAME
        if path.is_file() and config is None and not (path.parent / CONFIG_NAME).is_file():
            raise ValueError(f"{path} has no {CONFIG_NAME} beside it; give its config (--config)")
        config = config or weights.parent / CONFIG_NAME
        for needed in (config, weights):
            if not needed.is_file():
                raise ValueError(f"{needed.parent} holds no {needed.name}; {WHAT_TO_PUSH}")
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return cls(
                config_json=config.read_text(),
                weights=weights,
                weights_bytes=file.tell(),
                weights_sha256=digest,
            )

    @property
    def config_sha256(self) -> bytes:
        return hashlib.sha256(self.config_json.encode()).digest()

    def pieces(self, offset: int) -> Iterator[Piece]:
        """The weights from `offset` on; blocks while it reads."""
        with self.weights.open("rb") as file:
            file.seek(offset)
            while data := file.read(MAX_CHUNK_BYTES):
                yield Piece(offset, data)
                offset += len(data)


def default_id(path: Path) -> str:
    """The id under which a directory or a safetensors file is pushed unless another is given.

    Raises ValueError for another file.
    """
    _check_format(path)
    path = path.resolve()
    if path.name == WEIGHTS_NAME:
        return path.parent.name
    return path.stem if path.suffix == SUFFIX else path.name


def _check_format(path: Path) -> None:
    if path.is_file() and path.suffix != SUFFIX:
        raise ValueError(f"{path} is no {SUFFIX} file; {WHAT_TO_PUSH}")
