"""Names whose addresses a test changes, as DNS does when pods come and go."""

import socket
from collections.abc import Sequence


class Names:
    """`resolve` is the router's; a name has no addresses, or cannot be looked up, as told."""

    def __init__(self) -> None:
        self.hosts: dict[str, Sequence[str]] = {}
        self.failure: int | None = None  # getaddrinfo's, such as socket.EAI_AGAIN
        self.num_looked_up = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        self.num_looked_up += 1
        if self.failure is not None:
            raise socket.gaierror(self.failure, "the look-up failed")
        if not self.hosts.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [f"{address}:{port}" for address in self.hosts[host]]
