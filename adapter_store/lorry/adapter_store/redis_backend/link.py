"""The connections to a Redis: few, with bounded waits, and none tried in vain while it is away."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    ConnectionError,
    OutOfMemoryError,
    RedisError,
    TimeoutError,
)
from redis.retry import Retry

from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.scripts import SCRIPTS
from lorry.adapter_store.storage import MAX_CALLS
from lorry.rpc.errors import StoreFull, StoreUnavailable
from lorry.rpc.repeated_log import RepeatedLog

TIMEOUT_S = 5.0  # of one answer, and of a free connection
CONNECT_TIMEOUT_S = 2.0
RETRIES = 2
PROBE_PERIOD_S = 0.5
RETRY_AFTER_S = 1.0

log = logging.getLogger(__name__)


class RedisLink:
    """Owns the connections. All failures of Redis leave it as StoreFull or StoreUnavailable.

    They do not say where the Redis is, for clients may see them; the log does.
    """

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._client: Any = redis.Redis(connection_pool=_pool(address))
        self._scripts = {name: self._client.register_script(text) for name, text in SCRIPTS.items()}
        self._failures = RepeatedLog(log)
        self._lock = threading.Lock()
        self._away = False
        self._probing = False
        self._next_probe_s = 0.0

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """The client, for one call or pipeline."""
        probe = self._admit()
        try:
            yield self._client
        except OutOfMemoryError as error:
            self._set_here()
            raise StoreFull("the store's Redis has no room (maxmemory)") from error
        except (ConnectionError, TimeoutError) as error:
            self._set_away()
            raise self._unavailable(error) from error
        except RedisError as error:
            raise self._unavailable(error) from error
        else:
            self._set_here()
        finally:
            if probe:
                self._probing = False

    def run(self, name: str, *arguments: str | bytes | memoryview | int) -> Any:
        """Run a script of `scripts`."""
        with self.client():
            return self._scripts[name](args=arguments)

    def close(self) -> None:
        self._client.close()

    def _admit(self) -> bool:
        """While Redis is away let one call at a time try it; returns whether this is one."""
        with self._lock:
            if not self._away:
                return False
            if self._probing or time.monotonic() < self._next_probe_s:
                raise _unavailable()
            self._probing = True
            return True

    def _set_away(self) -> None:
        with self._lock:
            self._away = True
            self._next_probe_s = time.monotonic() + PROBE_PERIOD_S

    def _set_here(self) -> None:
        if self._away:
            self._away = False
            self._failures.worked()

    def _unavailable(self, error: RedisError) -> StoreUnavailable:
        self._failures.failed(type(error).__name__, logging.WARNING, "%s: %s", self._address, error)
        return _unavailable()


def _unavailable() -> StoreUnavailable:
    return StoreUnavailable("the store's Redis cannot be used now", retry_after_s=RETRY_AFTER_S)


def _pool(address: RedisAddress) -> redis.ConnectionPool:
    make: Any = redis.BlockingConnectionPool  # has no types
    options: dict[str, Any] = {}
    if address.tls:
        options = {
            "connection_class": redis.SSLConnection,
            "ssl_ca_certs": None if address.ca_file is None else str(address.ca_file),
            "ssl_check_hostname": True,
        }
    pool: redis.ConnectionPool = make(
        max_connections=MAX_CALLS,
        timeout=TIMEOUT_S,
        host=address.host,
        port=address.port,
        db=address.database,
        username=address.user,
        password=address.password,
        protocol=2,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), RETRIES),
        client_name="lorry-adapter-store",
        **options,
    )
    return pool
