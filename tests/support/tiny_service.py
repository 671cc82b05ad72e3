"""A service that does nothing, as a process: it keeps the contract of `python -m lorry.*`.

Its first argument is how it behaves: ready, never-ready, die-at-start, die-later, patient, which
drains for as long as any call is open, or stubborn, which ignores SIGTERM and writes the id of a
child of its own to the file of the second argument.
"""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import grpc.aio

from lorry.rpc.identity import Authenticator
from lorry.rpc.server import serving, stop_requested


def main(behaviour: str, *arguments: str) -> None:
    print("a line of output", flush=True)
    if behaviour == "die-at-start":
        sys.exit("no memory left")
    if behaviour == "stubborn":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(arguments[0]).write_text(str(child.pid))
    asyncio.run(serve(behaviour))


async def serve(behaviour: str) -> None:
    async with serving(
        _register,
        services=[],
        address="127.0.0.1:0",
        authenticator=Authenticator(),
        grace_s=600 if behaviour == "patient" else 0,
    ) as server:
        if behaviour == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.announce("tiny")
        await server.set_ready(behaviour != "never-ready")
        if behaviour == "die-later":
            sys.exit("lost the engine")
        if behaviour == "stubborn":
            await asyncio.Event().wait()
        await stop_requested()
        print("drained", flush=True)


def _register(server: grpc.aio.Server) -> None:
    """No service but health and reflection."""


if __name__ == "__main__":
    main(*sys.argv[1:])
