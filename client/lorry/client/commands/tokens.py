"""`lorry tokens`: make, list and revoke the bearer tokens of a deployment."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lorry.client.console import make_console, make_table
from lorry.client.secrets.directory import SecretsDirectory
from lorry.client.secrets.tokens import FILE_NAME, list_tokens, make_token, revoke_token
from lorry.rpc.identity import DEFAULT_TENANT, Role

app = App(name="tokens", help="Make the bearer tokens of a deployment.")


@app.command
def make(
    directory: Path,
    *names: str,
    role: Role | None = None,
    tenant: str = DEFAULT_TENANT,
    world_readable: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make a token for each name; those that exist are kept.

    DIRECTORY/callers/tokens.json gets the tokens' digests, for the --tokens of every service, and
    DIRECTORY/NAME/token the token, for the --token-file of a service or client.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    names
        What the tokens are called. A name that is a role is of that role.
    role
        What may be done with the tokens: infer, manage, worker, router or admin.
    tenant
        Whose adapters the tokens are for.
    world_readable
        Let every user read the tokens, for containers that run as another one; only DIRECTORY
        itself stays closed.
    """
    secrets = SecretsDirectory(directory)
    roles = {name: required_role(name, role) for name in check_names(names)}
    for name, its_role in roles.items():
        made = make_token(
            secrets, name, tenant=tenant, role=its_role, world_readable=world_readable
        )
        print(f"{secrets.of(name) / FILE_NAME} {'made' if made else 'kept'}")


@app.command(name="list")
def list_all(directory: Path) -> None:
    """List the tokens of a deployment.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    """
    table = make_table("name", "tenant", "role", "created", "sha256")
    for entry in list_tokens(SecretsDirectory(directory)):
        table.add_row(entry.name, entry.tenant, entry.role, entry.created, entry.sha256[:12])
    make_console().print(table)


@app.command
def revoke(directory: Path, *names: str) -> None:
    """Revoke tokens: services refuse them within a second of reading the file again.

    Parameters
    ----------
    directory
        Where the deployment's secrets lie.
    names
        Of the tokens.
    """
    for name in check_names(names):
        revoke_token(SecretsDirectory(directory), name)
        print(f"revoked {name}")


def check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("name at least one")
    return names


def implied_role(name: str) -> Role | None:
    """The role of a name that is one."""
    return Role(name) if name in {role.value for role in Role} else None


def required_role(name: str, role: Role | None) -> Role:
    found = role or implied_role(name)
    if found is None:
        raise ValueError(f"--role must be given for {name!r}, which is no role")
    return found
