"""`lorry up` as a process of its own, the way a user runs it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from demo.answers import DemoFailed
from demo.paths import MODEL_DIR
from lorry.client.endpoints import Endpoints, RunningServices

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.05


@asynccontextmanager
async def lorry_up(directory: Path) -> AsyncIterator[Endpoints]:
    """Router, store and worker on free ports, with all their files in `directory`."""
    state_file, output = directory / "up.json", directory / "up.log"
    with output.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "lorry.client.main", "up"],
            *["--model", str(MODEL_DIR)],
            *["--router-port", "0", "--store-port", "0", "--worker-port", "0"],
            *["--data", str(directory / "adapters"), "--logs", str(directory / "logs")],
            *["--state-file", str(state_file)],
            # More threads wait for each other at every operation of a model this small, which on
            # a busy machine makes it twenty times slower (84 instead of 1843 tokens/s on 2 cores).
            *["--worker-args", "--threads 1"],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the demo, which stops it in turn
        )
    try:
        yield await _endpoints(process, state_file, output)
    finally:
        await _stop(process)


async def _endpoints(
    process: asyncio.subprocess.Process, state_file: Path, output: Path
) -> Endpoints:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while process.returncode is None:
                if running := RunningServices.read(state_file):
                    return running.endpoints
                await asyncio.sleep(LOOK_AGAIN_S)
    except TimeoutError:
        raise DemoFailed(f"not ready after {START_TIMEOUT_S:g} s:\n{_text(output)}") from None
    raise DemoFailed(f"lorry up ended with status {process.returncode}:\n{_text(output)}")


def _text(output: Path) -> str:
    return output.read_text(errors="replace")


async def _stop(process: asyncio.subprocess.Process) -> None:
    try:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
