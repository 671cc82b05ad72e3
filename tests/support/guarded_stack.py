"""Store, worker and router of several tenants, each of which must show a token."""

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from lorry.client import Client
from lorry.client.probe import worker_status
from lorry.rpc.channel import Credentials
from lorry.rpc.identity import Role
from lorry.v1.worker_service_pb2 import WorkerStatus
from tests.support.processes import Stack

TENANTS = ["red", "blue"]
SERVICE_OF = {
    "AdapterDataService": "store",
    "AdapterService": "store",
    "CatalogueService": "store",
    "InferenceService": "router",
    "StoreAdminService": "store",
    "WorkerAdminService": "worker",
    "WorkerService": "worker",
}


def token(tenant: str, role: Role) -> str:
    return f"{role.value}-of-{tenant}"


def method_address(stack: Stack, path: str) -> str:
    """Where the method of this path is served."""
    service = path.split("/")[1].rpartition(".")[2]
    address: str = getattr(stack, SERVICE_OF[service]).address
    return address


class GuardedStack(Stack):
    def __init__(self, directory: Path, *worker_options: str) -> None:
        super().__init__(directory, *worker_options)
        entries = [
            {
                "sha256": hashlib.sha256(token(tenant, role).encode()).hexdigest(),
                "tenant": tenant,
                "role": role.value,
            }
            for tenant in TENANTS
            for role in Role
        ]
        tokens = directory / "tokens.json"
        tokens.write_text(json.dumps({"tokens": entries}))
        for service in (self.store, self.worker, self.router):
            service.options += ("--tokens", str(tokens))
        for service, role in ((self.worker, Role.WORKER), (self.router, Role.ROUTER)):
            file = directory / f"{role.value}.token"
            file.write_text(token("red", role))
            file.chmod(0o600)
            service.options += ("--token-file", str(file))

    async def worker_status(self) -> WorkerStatus:
        shown = Credentials(token=token("red", Role.ADMIN))
        return (await worker_status(self.worker.address, shown, timeout_s=10)).status

    @contextlib.asynccontextmanager
    async def client_of(self, tenant: str, role: Role = Role.INFER) -> AsyncIterator[Client]:
        async with Client(
            router=self.router.address, store=self.store.address, token=token(tenant, role)
        ) as client:
            yield client
