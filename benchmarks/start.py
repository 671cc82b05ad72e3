"""Seconds from the start of a worker to its first token, with a cold and a warm kernel cache.

    python -m benchmarks.start --model llama-3-8b -- --max-running 512

The worker is the real one, front and engine; its weights are random. What follows `--` are options
of the worker. A request comes as a router sends it. The first worker finds an empty cache of
compiled kernels, the second what the first has left; time counts from the exec of each.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.building import CONFIGS, device_name
from benchmarks.results_file import RESULTS, write_result
from lorry.rpc.channel import open_channel
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.v1 import worker_service_pb2 as pb
from lorry.v1.worker_service_pb2_grpc import WorkerServiceStub

REPO = Path(__file__).parents[1]
POLL_S = 0.02
PROMPT = list(range(3, 19))


async def measure(
    model: Path, options: list[str], cache: Path, timeout_s: float
) -> dict[str, float]:
    """Seconds until one worker listens, is ready, and has sent a token."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    started_s = time.perf_counter()
    async with asyncio.timeout(timeout_s), _worker(model, options, environment) as address:
        seconds = {"listening_s": time.perf_counter() - started_s}
        async with open_channel(address) as channel:
            await _until_ready(channel)
            seconds["ready_s"] = time.perf_counter() - started_s
            await _first_token(channel)
        seconds["first_token_s"] = time.perf_counter() - started_s
    return seconds


@contextlib.asynccontextmanager
async def _worker(
    model: Path, options: list[str], environment: Mapping[str, str]
) -> AsyncIterator[str]:
    """A worker's address; it is asked to end on exit, and its log goes to this one's stderr."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "lorry.worker", "--model", str(model), "--address", "127.0.0.1:0"],
        *["--load-format", "dummy", *options],
        env=environment,
        cwd=REPO,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        if " listening on " not in line:
            raise SystemExit("the worker did not start")
        yield line.split()[-1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _until_ready(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    while True:
        answer = await stub.Check(request)
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(POLL_S)


async def _first_token(channel: grpc.aio.Channel) -> None:
    """Attach as a router does and wait for a greedy request's first token."""
    stub: Any = WorkerServiceStub(channel)
    call = stub.Attach()
    hello = pb.Hello(router_id="benchmark", protocol_revision=PROTOCOL_REVISION)
    await call.write(pb.AttachRequest(hello=hello))
    submit = pb.Submit(seq=1, tenant="default", token_ids=PROMPT, max_tokens=2)
    submit.sampling.temperature, submit.sampling.seed = 0.0, 1
    await call.write(pb.AttachRequest(submit=submit))
    async for response in call:
        if response.WhichOneof("event") == "step" and response.step.token_ids:
            call.cancel()
            return
    raise SystemExit("the worker ended the stream")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", default="llama-3-8b", help="a directory of benchmarks/models")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    result.add_argument("--timeout-s", type=float, default=300.0, help="for each worker")
    result.add_argument("--directory", type=Path, default=RESULTS, help="for the result file")
    result.add_argument("--commit", help="where the tree came without its history")
    result.add_argument("worker_options", nargs="*", help="after --, for the worker")
    return result


def main() -> None:
    arguments = parser().parse_args()
    model = CONFIGS / arguments.model
    options = ["--device", arguments.device, *arguments.worker_options]
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            seconds = asyncio.run(measure(model, options, Path(cache), arguments.timeout_s))
            print(f"{name}:", *(f"{what} {value:.1f}" for what, value in seconds.items()))
            metrics |= {f"{name}_{what}": value for what, value in seconds.items()}
    write_result(
        f"start-{model.name}",
        benchmark="start",
        device=device_name(arguments.device),
        config={"model": model.name, "worker_options": options, "cores": os.cpu_count()},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


if __name__ == "__main__":
    main()
