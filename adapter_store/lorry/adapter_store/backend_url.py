"""Which backend a URL names."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.dummy_backend import DummyAdapters, DummyBackend
from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.redis_backend.address import RedisAddress, without_password
from lorry.adapter_store.redis_backend.backend import RedisBackend
from lorry.kernels.page_layout import ModelGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUrl:
    """A file://, redis:// or dummy: URL and what belongs to it; one of the first three is set."""

    directory: Path | None = None
    redis: RedisAddress | None = None
    dummy: DummyAdapters | None = None
    scratch_dir: Path | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        password_file: Path | None = None,
        ca_file: Path | None = None,
        scratch_dir: Path | None = None,
    ) -> "BackendUrl":
        """Raises ValueError, without a password, for a URL that is none of them."""
        parts = urlsplit(url)
        if parts.scheme in ("redis", "rediss"):
            address = RedisAddress.parse(url, password_file=password_file, ca_file=ca_file)
            return cls(redis=address, scratch_dir=scratch_dir)
        if parts.scheme == "dummy" and parts.path.isdecimal():
            return cls(dummy=DummyAdapters.parse(parts), scratch_dir=scratch_dir)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise ValueError(
                "backend must be file:///DIRECTORY, redis[s]://HOST or dummy:COUNT, "
                f"got {without_password(url)!r}"
            )
        return cls(directory=Path(unquote(parts.path)))

    def open(self, *, model_digest: bytes | None, geometry: ModelGeometry | None = None) -> Backend:
        """Without a digest one that holds adapters of any base model; blocks.

        Raises ValueError if it is another base model's, damaged, in use, or cannot be reached, or
        if it needs the geometry of the base model and there is none.
        """
        if self.redis is not None:
            return RedisBackend(self.redis, model_digest=model_digest, scratch_dir=self.scratch_dir)
        if self.directory is not None:
            return FileBackend(self.directory, model_digest=model_digest)
        if self.dummy is None or model_digest is None or geometry is None:
            raise ValueError("a dummy: backend is made by a store for its base model")
        return DummyBackend(
            self.dummy, geometry, model_digest=model_digest, scratch_dir=self.scratch_dir
        )
