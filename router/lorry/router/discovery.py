"""Where the workers are: addresses as given, and those that DNS has for a name now."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from lorry.rpc.repeated_log import RepeatedLog

DNS_PREFIX = "dns:///"
# A name that has no addresses; every other failure says nothing about them.
NO_ADDRESSES = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})
Resolve = Callable[[str, int], Awaitable[Iterable[str]]]

log = logging.getLogger(__name__)


class Target(NamedTuple):
    """HOST:PORT of one worker, or of as many as DNS knows by that name."""

    host: str
    port: int
    by_dns: bool

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises ValueError that names the text."""
        by_dns = text.startswith(DNS_PREFIX)
        host, _, port = text.removeprefix(DNS_PREFIX).rpartition(":")
        if not _is_name(host) or not (port.isascii() and port.isdigit()):
            raise ValueError(f"worker must be HOST:PORT or {DNS_PREFIX}NAME:PORT, got {text!r}")
        return cls(host, int(port), by_dns)


async def resolve_host(host: str, port: int) -> set[str]:
    """All addresses of a host, by the system's resolver; raises OSError.

    Of one family only: a worker with an address of each must not be taken for two.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = {str(info[4][0]) for info in found}
    hosts_v4 = {host for host in hosts if ":" not in host}
    return {_address(host, port) for host in hosts_v4 or hosts}


class Discovery:
    """`addresses` asks anew each time. Names that cannot be looked up keep what they had."""

    def __init__(self, targets: Sequence[Target], resolve: Resolve = resolve_host) -> None:
        self._resolve = resolve
        self._static = frozenset(f"{t.host}:{t.port}" for t in targets if not t.by_dns)
        self._names = [target for target in targets if target.by_dns]
        self._found: dict[Target, frozenset[str]] = {}
        self._logs = {name: RepeatedLog(log) for name in self._names}

    async def addresses(self) -> frozenset[str]:
        await asyncio.gather(*map(self._look_up, self._names))
        return self._static.union(*self._found.values())

    def host_of(self, address: str) -> str:
        """The host as it was given, by which the worker at the address is known."""
        for target, found in self._found.items():
            if address in found:
                return target.host
        return address.rpartition(":")[0].strip("[]")

    async def _look_up(self, name: Target) -> None:
        try:
            found = frozenset(await self._resolve(name.host, name.port))
        except OSError as error:
            self._logs[name].failed(error.errno, logging.WARNING, "%s: %s", name.host, error)
            if error.errno not in NO_ADDRESSES:
                return
            found = frozenset()
        else:
            self._logs[name].worked()
        if found != self._found.get(name):
            log.info("%s has %d addresses", name.host, len(found))
        self._found[name] = found


def _is_name(host: str) -> bool:
    """Whether the resolver can be asked for it at all."""
    try:
        return bool(host.encode("idna")) and "/" not in host
    except UnicodeError:
        return False


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
