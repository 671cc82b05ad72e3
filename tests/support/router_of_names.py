"""``python -m lorry.router`` whose DNS is the JSON file HOSTS_FILE: the addresses of each name."""

import asyncio
import json
import os
import socket
from pathlib import Path

from lorry.router.config import Config
from lorry.router.lifetime import running
from lorry.rpc.command import run_service
from lorry.rpc.server import stop_requested

HOSTS_FILE = "HOSTS_FILE"


def hosts() -> dict[str, list[str]]:
    read: dict[str, list[str]] = json.loads(Path(os.environ[HOSTS_FILE]).read_text())
    return read


async def resolve(host: str, port: int) -> list[str]:
    addresses = hosts().get(host)
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [f"{address}:{port}" for address in addresses]


async def serve(config: Config) -> None:
    async with running(config, resolve=resolve) as router:
        router.server.announce("router")
        await stop_requested()
        await router.drain()


if __name__ == "__main__":
    run_service(
        Config,
        lambda config: asyncio.run(serve(config)),
        name="router",
        help="A router whose names are in a file.",
    )
