"""A real Redis of one test: started on a free port, killed, restarted, filled up, cut off."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tests.support.command import REPO

START_S = 60.0


class RedisServer:
    """Owns the process. Its data outlive it in `directory`."""

    def __init__(self, directory: Path, *options: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = _free_port()
        self._options = ["--appendonly", "yes", "--appendfsync", "always", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Any = redis.Redis(port=self.port)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Returns once it answers."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *[_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""],
                    *["--dir", str(self.directory), *self._options],
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline_s = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline_s, "the Redis did not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: it loses what it did not write."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang until `resume`: connections stay, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def serve_tls(self) -> int:
        """Also by TLS, with the certificate of its options; returns the port."""
        port = _free_port()
        self.client.config_set("tls-port", port)
        return port

    def close(self) -> None:
        self.client.close()
        if self._process is not None:
            self._end(signal.SIGKILL)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(60)


@contextlib.contextmanager
def running_redis(directory: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(directory, *options)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _binary() -> str:
    found = shutil.which("redis-server") or shutil.which(REPO / ".cache" / "redis-server")
    assert found, "there is no redis-server: run `make .cache/redis-server`"
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
