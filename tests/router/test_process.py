"""The router as operators run it: a process."""

import asyncio
import contextlib
import hashlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import NoWorker
from lorry.rpc.status import from_rpc
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.byte_model import tokens_of
from tests.support.command import child_environment
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import LENGTH, FakeWorker, Reply
from tests.support.router_stack import Stack, read_answer

SPEC = pb.GenerationSpec(prompt="p")


async def start(*arguments: str, **environment: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "lorry.router", *arguments],
        env=child_environment(**environment),
        stdout=PIPE,
        stderr=PIPE,
    )


async def output_of(*arguments: str, **environment: str) -> tuple[int | None, str, str]:
    process = await start(*arguments, **environment)
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, stdout.decode(), stderr.decode()


@contextlib.asynccontextmanager
async def router_process(model: Path, *arguments: str) -> AsyncIterator[tuple[Process, Any]]:
    """The process, and a Stack around it without the router's insides."""
    digest = read_base_model(model).digest
    async with (
        FakeWorker(digest).serving() as worker,
        FakeStore().serving() as store,
    ):
        process = await start(
            *["--model", str(model), "--address", "127.0.0.1:0"],
            *["--worker", worker.address, "--store", store.address, *arguments],
        )
        try:
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
            assert line.startswith("lorry.router listening on 127.0.0.1:")
            async with grpc.aio.insecure_channel(line.split()[-1]) as channel:
                nothing: Any = None
                yield process, Stack(nothing, [worker], store, channel)
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def test_it_serves_and_sigterm_lets_running_requests_finish(model: Path) -> None:
    async with router_process(model) as (process, stack):
        await stack.until_health(ready=True)
        running = asyncio.ensure_future(read_answer(stack.open(SPEC)))
        await stack.worker.until(lambda: len(stack.worker.submits) == 1)
        stack.worker.draw(1, *tokens_of("to the "))
        process.send_signal(signal.SIGTERM)
        await stack.until_health(ready=False)
        stack.worker.draw(1, *tokens_of("end"))
        stack.worker.finish(1, LENGTH)
        assert (await running).text == "to the end"
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_sigterm_ends_what_does_not_finish(model: Path) -> None:
    async with router_process(model, "--grace-s", "0.2") as (process, stack):
        await stack.until_health(ready=True)
        call = stack.open(SPEC)
        await stack.worker.until(lambda: len(stack.worker.submits) == 1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_roles_are_checked_and_tokens_are_shown(model: Path, tmp_path: Path) -> None:
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "tenant": "t", "role": "infer"}
    tokens, own = tmp_path / "tokens.json", tmp_path / "own"
    tokens.write_text(json.dumps({"tokens": [entry]}))
    own.write_text("router-token\n")
    arguments = ["--tokens", str(tokens), "--token-file", str(own)]
    async with router_process(model, *arguments) as (_, stack):
        await stack.until_health(ready=True)
        stack.worker.reply = lambda submit: Reply(tokens_of("ok"))
        stub: Any = InferenceServiceStub(stack.channel)
        request = pb.GenerateRequest(spec=SPEC)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Generate(request)
        assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer secret"),)
        assert (await stub.Generate(request, metadata=metadata, timeout=20)).text == "ok"
        assert stack.worker.submits[0].tenant == "t"
        assert stack.worker.tokens == {"Bearer router-token"}


async def test_without_workers_and_store_it_lives_but_is_not_ready(model: Path) -> None:
    process = await start(
        *["--model", str(model), "--address", "127.0.0.1:0"],
        *["--worker", "127.0.0.1:1", "--store", "127.0.0.1:1"],
    )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    async with grpc.aio.insecure_channel(line.split()[-1]) as channel:
        nothing: Any = None
        stack = Stack(nothing, [], nothing, channel)
        await stack.until_health(ready=False)
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
        assert isinstance(from_rpc(failure.value), NoWorker)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0


async def test_help_names_every_option_with_its_default() -> None:
    status, stdout, _ = await output_of("--help")
    assert status == 0
    for option in ("--model", "--worker", "--store", "--max-queued-requests", "--grace-s"):
        assert option in stdout
    assert "127.0.0.1:50053" in stdout
    assert "LORRY_ROUTER_MODEL" in stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-queued-requests", "0"], "max_queued_requests must be positive, got 0"),
        (["--address", "0.0.0.0:0"], "reachable from other machines"),
        (["--tokens", "/nonexistent"], "/nonexistent"),
    ],
)
async def test_wrong_options_end_it_with_a_sentence(
    model: Path, arguments: list[str], said: str
) -> None:
    status, stdout, stderr = await output_of("--model", str(model), *arguments)
    assert status not in (0, None)
    assert said in " ".join((stdout + stderr).replace("│", " ").split())
    assert "Traceback" not in stderr


async def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    status, _, stderr = await output_of(LORRY_ROUTER_MODEL=str(tmp_path))
    assert status == 1
    assert "config.json" in stderr
    assert "Traceback" not in stderr


async def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, lorry.router.__main__; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=child_environment()
    )
    assert await asyncio.wait_for(process.wait(), 60) == 0
