"""`lorry certs`: a small private authority and the certificates of a deployment."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lorry.client.commands.tokens import check_names, implied_role
from lorry.client.console import make_console, make_table
from lorry.client.secrets.certificates import (
    caller_name,
    list_callers,
    list_certificates,
    make_certificate,
    renew_certificates,
    revoke_certificate,
)
from lorry.client.secrets.directory import SecretsDirectory
from lorry.rpc.identity import DEFAULT_TENANT, Role

DEFAULT_DAYS = 90
app = App(name="certs", help="Make the certificates of a deployment.")


@app.command
def make(
    directory: Path,
    *names: str,
    host: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    days: int = DEFAULT_DAYS,
    role: Role | None = None,
    tenant: str = DEFAULT_TENANT,
    world_readable: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make or replace the certificate of each name, and the authority that signs them.

    DIRECTORY/NAME gets tls.crt, tls.key and ca.crt, for the --tls of a service or client, and
    DIRECTORY/callers/certificates.json who may call, for --tls-callers. DIRECTORY/authority signs
    and is for nobody else.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    names
        Of services and clients. Each may serve at its name and call as spiffe://lorry/NAME.
    host
        Another name or address at which those services are called. May be repeated.
    days
        For how long the certificates are valid.
    role
        As what the names may call: infer, manage, worker, router or admin; default: a name that is
        a role as that role, and others not at all.
    tenant
        Whose adapters the certificates are for.
    world_readable
        Let every user read the keys, for containers that run as another one; only DIRECTORY itself
        stays closed.
    """
    if days < 1:
        raise ValueError(f"--days must be at least 1, got {days}")
    secrets = SecretsDirectory(directory)
    for name in check_names(names):
        make_certificate(
            secrets,
            name,
            hosts=list(dict.fromkeys((name, *host))),
            lifetime=timedelta(days=days),
            tenant=tenant,
            role=role or implied_role(name),
            world_readable=world_readable,
        )
        print(f"{secrets.of(name)} made for {', '.join((name, *host))}")


@app.command
def renew(directory: Path, *, every: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Renew the certificates that have less than a third of their life left.

    Services and clients take the new ones while they run. Run it daily.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    every
        Renew all of them.
    """
    for name in renew_certificates(SecretsDirectory(directory), every=every):
        print(f"renewed {name}")


@app.command(name="list")
def list_all(directory: Path) -> None:
    """List the certificates of a deployment.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    """
    secrets = SecretsDirectory(directory)
    callers = list_callers(secrets)
    table = make_table("name", "hosts", "expires", "calls as tenant and role")
    for entry in list_certificates(secrets):
        caller = callers.get(caller_name(entry.name), "")
        table.add_row(entry.name, ", ".join(entry.hosts), f"{entry.expires:%Y-%m-%d}", caller)
    make_console().print(table)


@app.command
def revoke(directory: Path, *names: str) -> None:
    """Take the names' right to call, and delete their certificates.

    Services refuse their calls within a second of reading the file again.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    names
        Of the certificates.
    """
    for name in check_names(names):
        revoke_certificate(SecretsDirectory(directory), name)
        print(f"revoked {name}")
