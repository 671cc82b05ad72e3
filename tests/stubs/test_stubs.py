"""Clients in other languages, made from the protos alone, talk to real services."""

import asyncio
import shutil
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.command import REPO
from tests.support.processes import Stack, ready

HERE = Path(__file__).parent
PROTOS = REPO / "proto"
GOOGLEAPIS = Path(sysconfig.get_path("purelib"))  # googleapis-common-protos brings the files too
ADAPTER = REPO / "demo" / "adapters" / "reverse"
BUILD_S, RUN_S = 600.0, 180.0


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    stack = Stack(tmp_path)
    try:
        await stack.start()
        await ready(stack.router.address)
        yield stack
    finally:
        await stack.stop()


async def run(program: str | Path, *arguments: object, directory: Path, timeout_s: float) -> str:
    process = await asyncio.create_subprocess_exec(
        program,
        *map(str, arguments),
        cwd=directory,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, (stdout + stderr).decode()
    return stdout.decode()


def assert_answers(printed: str) -> None:
    assert printed.split() == ["tenants/default/adapters/reverse", "ananab", "ananab"]


async def test_a_client_in_node(stack: Stack, tmp_path: Path) -> None:
    shutil.copytree(HERE / "node", tmp_path / "node")
    await run("npm", "ci", directory=tmp_path / "node", timeout_s=BUILD_S)
    services = [stack.router.address, stack.store.address]
    arguments = ["client.js", *services, ADAPTER, PROTOS, GOOGLEAPIS]
    printed = await run("node", *arguments, directory=tmp_path / "node", timeout_s=RUN_S)
    assert_answers(printed)


async def test_a_client_in_cpp(stack: Stack, tmp_path: Path) -> None:
    out = tmp_path / "cpp"
    build = ["make", f"GOOGLEAPIS={GOOGLEAPIS}", f"OUT={out}"]
    await run(*build, directory=HERE / "cpp", timeout_s=BUILD_S)
    arguments = [stack.router.address, stack.store.address, ADAPTER]
    assert_answers(await run(out / "client", *arguments, directory=tmp_path, timeout_s=RUN_S))
