"""Where a Redis is, from a URL and files of secrets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

FORM = "redis[s]://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """As text it has no password."""

    host: str
    port: int = 6379
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: Path | None = None

    @classmethod
    def parse(
        cls, url: str, *, password_file: Path | None = None, ca_file: Path | None = None
    ) -> Self:
        """Raises ValueError, without the URL's password, for what is not of the form `FORM`."""
        parts = urlsplit(url)
        try:
            port, host = parts.port or 6379, parts.hostname
        except ValueError:
            port, host = 0, None
        database = parts.path.removeprefix("/") or "0"
        extra = parts.query or parts.fragment
        if parts.scheme not in ("redis", "rediss") or not host or extra or not database.isdigit():
            raise ValueError(f"backend must be {FORM}, got {without_password(url)!r}")
        password = unquote(parts.password) if parts.password else None
        if password is None and password_file is not None:
            password = _read(password_file)
        return cls(
            host=host,
            port=port,
            database=int(database),
            user=unquote(parts.username) if parts.username else None,
            password=password,
            tls=parts.scheme == "rediss",
            ca_file=ca_file,
        )

    def __str__(self) -> str:
        user = f"{quote(self.user)}@" if self.user else ""
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{user}{self.host}:{self.port}/{self.database}"


def _read(password_file: Path) -> str:
    try:
        return password_file.read_text().strip()
    except OSError as error:
        raise ValueError(f"redis_password_file {password_file}: {error.strerror}") from error


def without_password(url: str) -> str:
    """A URL that may be printed."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
