"""The options of every command that calls a service."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from lorry.client.client import Client
from lorry.client.endpoints import (
    DEFAULT_STATE_FILE,
    STATE_FILE_VARIABLE,
    Endpoints,
    find_endpoints,
)
from lorry.rpc.channel import Credentials, read_token

CONNECTION = Group.create_ordered("Connection")


@Parameter(name="*", group=CONNECTION)
@dataclass(frozen=True, kw_only=True)
class Connection:
    """Which services to call, and as whom."""

    router: Annotated[str | None, Parameter(env_var="LORRY_ROUTER")] = None
    """HOST:PORT of the router, or of several, separated by commas, of which the next is asked
    where one is gone; default: of the running `lorry up`, else 127.0.0.1:50051."""

    store: Annotated[str | None, Parameter(env_var="LORRY_STORE")] = None
    """HOST:PORT of the adapter store; default: of the running `lorry up`, else 127.0.0.1:50052."""

    token_file: Annotated[Path | None, Parameter(env_var="LORRY_TOKEN_FILE")] = None
    """File that holds the bearer token; default: none is sent."""

    tls: Annotated[Path | None, Parameter(env_var="LORRY_TLS")] = None
    """Directory with ca.crt, which must have signed the services' certificates, and tls.crt and
    tls.key where services ask for a certificate; default: connections in plain text."""

    timeout_s: Annotated[float, Parameter(env_var="LORRY_TIMEOUT_S")] = 300.0
    """Seconds that a call may take, with its retries; an upload has an hour of its own."""

    state_file: Annotated[Path, Parameter(env_var=STATE_FILE_VARIABLE)] = DEFAULT_STATE_FILE
    """Where `lorry up` wrote down the addresses of its services."""

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ValueError(f"--timeout-s must be positive, got {self.timeout_s}")

    def endpoints(self, *, worker: str | None = None) -> Endpoints:
        return find_endpoints(self.state_file, router=self.router, store=self.store, worker=worker)

    def token(self) -> str | None:
        """What the token file holds now; raises ValueError for a file without a token."""
        return None if self.token_file is None else read_token(self.token_file)

    def credentials(self) -> Credentials:
        return Credentials(token_file=self.token_file, tls=self.tls)

    def client(self) -> Client:
        endpoints = self.endpoints()
        return Client(
            router=endpoints.router,
            store=endpoints.store,
            token_file=self.token_file,
            tls=self.tls,
            timeout_s=self.timeout_s,
        )


DEFAULT = Connection()
