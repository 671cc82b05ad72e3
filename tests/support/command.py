"""Running the `lorry` command as users do: as a process."""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parents[2]
SERVICES = ["ROUTER", "ADAPTER_STORE", "WORKER"]
SOURCE_ROOTS = ["adapter_store", "client", "kernels", "proto/python", "router", "worker"]


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment without lorry's own variables, and with the repository's code."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LORRY_")}
    paths = [str(REPO), *(str(REPO / root) for root in SOURCE_ROOTS)]
    if others := inherited.get("PYTHONPATH"):
        paths.append(others)
    # A service on a chosen port would else take another one that may not be free.
    no_metrics = {f"LORRY_{name}_METRICS_ADDRESS": "" for name in SERVICES}
    return {**inherited, **no_metrics, "PYTHONPATH": os.pathsep.join(paths), **variables}


async def lorry(
    *arguments: str, environment: Mapping[str, str], stdin: str = "", timeout_s: float = 60.0
) -> Result:
    """Run ``lorry ARGUMENTS`` to its end; the bound only guards against hanging."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *["-m", "lorry.client.main", *arguments],
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(stdin.encode()), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Result(process.returncode, stdout.decode(), stderr.decode())
