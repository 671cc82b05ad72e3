"""How many tokens the router streams to 64 clients in one second of its CPU time.

    python -m benchmarks.router
    python -m benchmarks.router --against ../lorry-before

The router is the real process. Worker, store and clients are stand-ins in processes of their own:
the worker draws a token for every request at each step and computes nothing. Two loads: `paced`,
where steps come as from a GPU and nearly every token is a message of its own, and `flood`, where
they come as fast as the router takes them and it coalesces. With `--against`, the router of another
checkout is measured in turns with this one, so that both meet the same machine.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from benchmarks.results_file import checked_out_commit, host_name, spread, write_result
from lorry.rpc.base_model import read_base_model
from lorry.rpc.identity import Authenticator
from lorry.rpc.protocol import PROTOCOL_REVISION
from lorry.rpc.server import serving, stop_requested
from lorry.v1 import catalogue_service_pb2, common_pb2, worker_service_pb2
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.catalogue_service_pb2_grpc import (
    CatalogueServiceServicer,
    add_CatalogueServiceServicer_to_server,
)
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorry.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)

REPO = Path(__file__).parents[1]
CLIENTS = 64
OUTPUT_TOKENS = 512
PROMPT = "Tell me a story about a lorry."
STEPS_PER_S = {"paced": 60.0, "flood": 1000.0}
IDLE_STEPS_PER_S = 10.0
SOURCES = ("proto/python", "router")  # of a checkout, that its router imports
Round = dict[str, float]


class InstantWorker(WorkerServiceServicer):
    """Draws one token for each request at each step."""

    def __init__(self, model: Path, steps_per_s: float) -> None:
        self._base_model = read_base_model(model)
        self._steps_per_s = steps_per_s
        self._drawn: dict[int, int] = {}  # number of tokens, by seq
        self._limits: dict[int, int] = {}

    async def Attach(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[worker_service_pb2.AttachResponse]:
        await anext(aiter(request_iterator))
        listener = asyncio.create_task(self._listen(request_iterator))
        context.add_done_callback(lambda _: listener.cancel())
        welcome = worker_service_pb2.Welcome(
            worker_id="instant",
            epoch=1,
            protocol_revision=PROTOCOL_REVISION,
            model_digest=self._base_model.digest,
            max_context_tokens=self._base_model.max_context_tokens,
            max_rank=64,
            submit_limit=1 << 40,
        )
        yield worker_service_pb2.AttachResponse(welcome=welcome)
        next_s = time.monotonic()
        while True:
            steps_per_s = self._steps_per_s if self._drawn else IDLE_STEPS_PER_S
            next_s = max(next_s + 1 / steps_per_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            yield worker_service_pb2.AttachResponse(step=self._step())

    async def GetWorkerStatus(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def _listen(self, request_iterator: Any) -> None:
        async for request in request_iterator:
            if request.HasField("submit"):
                self._drawn[request.submit.seq] = 0
                self._limits[request.submit.seq] = request.submit.max_tokens

    def _step(self) -> worker_service_pb2.StepOutput:
        seqs = list(self._drawn)
        step = worker_service_pb2.StepOutput(
            seqs=seqs, token_ids=[100 + (seq + self._drawn[seq]) % 64 for seq in seqs]
        )
        for seq in seqs:
            self._drawn[seq] += 1
            if self._drawn[seq] == self._limits[seq]:
                del self._drawn[seq], self._limits[seq]
                step.finished.add(seq=seq, reason=common_pb2.FINISH_REASON_LENGTH)
        return step


class EmptyCatalogue(CatalogueServiceServicer):
    async def WatchCatalogue(
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[catalogue_service_pb2.WatchCatalogueResponse]:
        while True:
            yield catalogue_service_pb2.WatchCatalogueResponse(
                store_id="empty", revision=1, snapshot_complete=True
            )
            await asyncio.sleep(10)


async def serve_peers(model: Path, steps_per_s: float) -> None:
    """The worker's and the store's stand-ins, until SIGTERM."""

    def register(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(InstantWorker(model, steps_per_s), server)
        add_CatalogueServiceServicer_to_server(EmptyCatalogue(), server)

    async with serving(
        register, services=[], address="127.0.0.1:0", authenticator=Authenticator(), grace_s=0
    ) as server:
        print(f"listening on 127.0.0.1:{server.port}", flush=True)
        await stop_requested()


async def stream_once(channel: grpc.aio.Channel) -> tuple[int, int]:
    """Tokens and messages of one request."""
    spec = pb.GenerationSpec(
        prompt=PROMPT,
        stopping=common_pb2.StoppingOptions(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
    )
    tokens = messages = 0
    async for response in InferenceServiceStub(channel).StreamGenerate(
        pb.StreamGenerateRequest(spec=spec)
    ):
        tokens += len(response.chunk.token_ids)
        messages += 1
    return tokens, messages


async def measure(channels: Sequence[grpc.aio.Channel], pid: int) -> Round:
    """One request of every client at the same time."""
    process = psutil.Process(pid)
    cpu_s, start_s = cpu_time_s(process), time.monotonic()
    counts = await asyncio.gather(*map(stream_once, channels))
    cpu_s, wall_s = cpu_time_s(process) - cpu_s, time.monotonic() - start_s
    tokens, messages = (sum(column) for column in zip(*counts, strict=True))
    assert tokens == CLIENTS * OUTPUT_TOKENS
    return {
        "tokens_per_cpu_s": tokens / cpu_s,
        "tokens_per_s": tokens / wall_s,
        "tokens_per_message": tokens / messages,
    }


@asynccontextmanager
async def clients(router: str) -> AsyncIterator[Sequence[grpc.aio.Channel]]:
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each client
    channels = [grpc.aio.insecure_channel(router, options=options) for _ in range(CLIENTS)]
    try:
        yield channels
    finally:
        for channel in channels:
            await channel.close()


def cpu_time_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def child(*arguments: str, checkout: Path = REPO) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process, and the address that its first line ends with."""
    sources = os.pathsep.join(str(checkout / source) for source in (".", *SOURCES))
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": sources},
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


@asynccontextmanager
async def ready_router(model: Path, load: str, checkout: Path) -> AsyncIterator[tuple[str, int]]:
    with (
        child("benchmarks.router", "--peers", load, "--model", str(model)) as (_, peers),
        child(
            *["lorry.router", "--address", "127.0.0.1:0", "--model", str(model)],
            *["--store", peers, "--worker", peers],
            checkout=checkout,
        ) as (process, router),
    ):
        async with grpc.aio.insecure_channel(router) as channel:
            while True:
                try:
                    await stream_once(channel)
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                await asyncio.sleep(0.1)
        yield router, process.pid


async def measure_in_turns(
    model: Path, load: str, checkouts: Mapping[str, Path], rounds: int
) -> dict[str, list[Round]]:
    """Of each checkout, after a round to warm up."""
    measured: dict[str, list[Round]] = {name: [] for name in checkouts}
    async with AsyncExitStack() as stack:
        routers = {}
        for name, checkout in checkouts.items():
            router, pid = await stack.enter_async_context(ready_router(model, load, checkout))
            routers[name] = (await stack.enter_async_context(clients(router)), pid)
        for _ in range(rounds + 1):
            for name, (channels, pid) in routers.items():
                measured[name].append(await measure(channels, pid))
    return {name: all_rounds[1:] for name, all_rounds in measured.items()}


async def benchmark(model: Path, rounds: int, checkouts: Mapping[str, Path]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for load in STEPS_PER_S:
        for name, measured in (await measure_in_turns(model, load, checkouts, rounds)).items():
            key = f"{load}{name}"
            metrics[key] = {
                metric: spread([round_[metric] for round_ in measured], digits=2)
                for metric in measured[0]
            }
            print(key, json.dumps(metrics[key]), flush=True)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=REPO / "demo" / "model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="a checkout to compare with")
    parser.add_argument("--peers", choices=STEPS_PER_S, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peers:
        asyncio.run(serve_peers(arguments.model, STEPS_PER_S[arguments.peers]))
        return
    checkouts = {"": REPO}
    if arguments.against:
        directory = arguments.against.resolve()
        checkouts[f" at commit {checked_out_commit(directory)}"] = directory
    write_result(
        "router",
        benchmark="router",
        device=host_name(),
        config={
            "clients": CLIENTS,
            "output_tokens": OUTPUT_TOKENS,
            "rounds": arguments.rounds,
            "steps_per_s": STEPS_PER_S,
        },
        metrics=asyncio.run(benchmark(arguments.model, arguments.rounds, checkouts)),
    )


if __name__ == "__main__":
    main()
