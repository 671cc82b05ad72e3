"""Which backend a URL names."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lorry.adapter_store.backend import Backend
from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.redis_backend.address import RedisAddress, without_password
from lorry.adapter_store.redis_backend.backend import RedisBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUrl:
    """A file:// or redis:// URL and what belongs to it."""

    directory: Path | None  # of file://
    redis: RedisAddress | None
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
        """Raises ValueError, without a password, for a URL that is neither."""
        parts = urlsplit(url)
        if parts.scheme in ("redis", "rediss"):
            address = RedisAddress.parse(url, password_file=password_file, ca_file=ca_file)
            return cls(directory=None, redis=address, scratch_dir=scratch_dir)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise ValueError(
                "backend must be file:///DIRECTORY or redis[s]://HOST, "
                f"got {without_password(url)!r}"
            )
        return cls(directory=Path(unquote(parts.path)), redis=None)

    def open(self, *, model_digest: bytes | None) -> Backend:
        """Without a digest one that holds adapters of any base model; blocks.

        Raises ValueError if it is another base model's, damaged, in use, or cannot be reached.
        """
        if self.redis is not None:
            return RedisBackend(self.redis, model_digest=model_digest, scratch_dir=self.scratch_dir)
        assert self.directory is not None
        return FileBackend(self.directory, model_digest=model_digest)
