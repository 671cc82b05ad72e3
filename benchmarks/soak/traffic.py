"""Clients of every kind: patient, hasty, slow, silent, mistaken, killed."""

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc.aio

from benchmarks.soak.catalogue import BASE, CHANGING, QUESTIONS, STABLE, Catalogue, Question
from benchmarks.soak.services import Services
from lorry.client import Client, Request
from lorry.rpc.errors import (
    AdapterNotFound,
    ContextLengthExceeded,
    DeadlineExpired,
    InvalidSampling,
    LorryError,
    NoWorker,
    SlowReader,
    StoreFull,
    StoreUnavailable,
    VersionNotFound,
    WorkerLost,
)
from lorry.rpc.status import from_rpc
from lorry.v1 import inference_service_pb2 as pb
from lorry.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.command import child_environment
from tests.support.waiting import set_within

PATIENCE_S = 60.0
# What a fault may do to any request, though it was right and its adapter is there.
OF_FAULTS = (NoWorker, WorkerLost, StoreUnavailable, StoreFull)
OF_CHANGES = (AdapterNotFound, VersionNotFound)  # its adapter was deleted or replaced
STREAMS_OF_KILLED = 4
LITTLE_AHEAD = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
]


@dataclass
class Tally:
    """What clients have sent and how it ended."""

    sent: int = 0
    killed: int = 0  # requests of clients that were killed: of these some may not have arrived
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)  # kind, end
    tokens: int = 0
    violations: list[str] = field(default_factory=list)

    def total(self, end: str) -> int:
        return sum(count for (_, each), count in self.ends.items() if each == end)


@dataclass
class Traffic:
    """Clients that send one request after another, until they are told to stop."""

    services: Services
    catalogue: Catalogue
    tally: Tally
    stopping: asyncio.Event

    def __post_init__(self) -> None:
        self._kinds: list[tuple[int, Callable[[Client, Random], Awaitable[None]]]] = [
            (30, self._patient),
            (15, self._whole),
            (15, self._leaving),
            (8, self._leaving_at_once),
            (15, self._hasty),
            (8, self._slow),
            (1, self._silent),
            (6, self._mistaken),
        ]

    async def run(self, random: Random) -> None:
        weights, kinds = zip(*self._kinds, strict=True)
        async with self.services.client() as client:
            while not self.stopping.is_set():
                [kind] = random.choices(kinds, weights)
                await kind(client, random)

    async def run_killed(self, random: Random) -> None:
        """Now and then a whole client process, killed while it streams."""
        while not await set_within(self.stopping, random.uniform(5, 20)):
            self.tally.killed += STREAMS_OF_KILLED
            client = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "tests.support.streaming_client"],
                *[self.services.router.address, str(STREAMS_OF_KILLED)],
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=child_environment(),
            )
            assert client.stdout is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.stdout.readline(), random.uniform(2, 15))
            with contextlib.suppress(ProcessLookupError):
                client.kill()
            await client.wait()

    async def _patient(self, client: Client, random: Random) -> None:
        await self._stream("patient", client, random)

    async def _leaving(self, client: Client, random: Random) -> None:
        await self._stream("leaving", client, random, leave_after=random.randint(1, 60))

    async def _hasty(self, client: Client, random: Random) -> None:
        timeout_s = random.choice([0.02, 0.1, 0.3, 1.0])
        await self._stream("hasty", client, random, timeout_s=timeout_s)

    async def _slow(self, client: Client, random: Random) -> None:
        await self._stream("slow", client, random, pause_s=random.uniform(0.02, 0.3))

    async def _whole(self, client: Client, random: Random) -> None:
        adapter_id, question = self._choose(random)
        async with self._counted("whole", adapter_id):
            answer = await client.generate(question.request(adapter_id), timeout_s=PATIENCE_S)
            self._check(adapter_id, question, list(answer.token_ids), answer.completion.version)

    async def _stream(
        self,
        kind: str,
        client: Client,
        random: Random,
        *,
        timeout_s: float = PATIENCE_S,
        leave_after: int | None = None,
        pause_s: float = 0.0,
    ) -> None:
        adapter_id, question = self._choose(random)
        token_ids, version = list[int](), None
        async with (
            self._counted(kind, adapter_id, may_expire=timeout_s < PATIENCE_S) as end,
            client.stream(question.request(adapter_id), timeout_s=timeout_s) as stream,
        ):
            async for chunk in stream:
                token_ids += chunk.token_ids
                if leave_after is not None and len(token_ids) >= leave_after:
                    end.append("left")
                    break
                await asyncio.sleep(pause_s)
            if stream.completion is not None:
                version = stream.completion.version
        self._check(adapter_id, question, token_ids, version)

    async def _leaving_at_once(self, client: Client, random: Random) -> None:
        """Before the first token, or about then."""
        adapter_id, question = self._choose(random)
        async with self._counted("leaving at once", adapter_id) as end:
            call = asyncio.ensure_future(client.generate(question.request(adapter_id)))
            await asyncio.wait([call], timeout=random.uniform(0, 0.1))
            if call.cancel():
                end.append("left")
            await asyncio.gather(call, return_exceptions=True)
            if not call.cancelled():
                call.result()

    async def _silent(self, client: Client, random: Random) -> None:
        """Reads nothing for longer than the router waits, of an answer that is too long for it."""
        request = Request(prompt="x", max_tokens=900, ignore_eos=True, top_logprobs=20)
        message = pb.StreamGenerateRequest(spec=request.to_proto())
        address = self.services.router.address
        async with (
            self._counted("silent", BASE, SlowReader),
            grpc.aio.insecure_channel(address, options=LITTLE_AHEAD) as channel,
        ):
            stub: Any = InferenceServiceStub(channel)
            call = stub.StreamGenerate(message, timeout=PATIENCE_S)
            try:
                await call.read()
                await asyncio.sleep(6)
                while await call.read() is not grpc.aio.EOF:
                    """What is still there."""
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error) from error

    async def _mistaken(self, client: Client, random: Random) -> None:
        mistakes: list[tuple[dict[str, Any], type[LorryError]]] = [
            ({"adapter": "none"}, AdapterNotFound),
            ({"temperature": -1.0}, InvalidSampling),
            ({"max_tokens": 5000}, ContextLengthExceeded),
        ]
        fields, error = random.choice(mistakes)
        async with self._counted("mistaken", BASE, error) as end:
            defaults: dict[str, Any] = {"prompt": "p", "max_tokens": 4}
            await client.generate(Request(**(defaults | fields)))
            end.append("served")
            self.tally.violations.append(f"a mistaken request was served: {fields}")

    def _choose(self, random: Random) -> tuple[str, Question]:
        ids = random.choice([(BASE,), STABLE, STABLE, CHANGING])
        return random.choice(ids), random.choice(QUESTIONS)

    @contextlib.asynccontextmanager
    async def _counted(
        self, kind: str, adapter_id: str, *may: Any, may_expire: bool = False
    ) -> AsyncIterator[list[str]]:
        """Count a request and how it ended; the body may say so if it is not by its answer."""
        allowed = (*OF_FAULTS, *may)
        allowed += OF_CHANGES if adapter_id in CHANGING else ()
        allowed += (DeadlineExpired,) if may_expire else ()
        self.tally.sent += 1
        said = list[str]()
        try:
            yield said
        except LorryError as error:
            self.tally.ends[kind, error.reason or error.code.name] += 1
            if not isinstance(error, allowed):
                self.tally.violations.append(f"{kind} request of {adapter_id!r}: {error!r}")
            await asyncio.sleep(0.05)  # nobody hurries to fail again
        else:
            self.tally.ends[kind, said[0] if said else "OK"] += 1

    def _check(
        self, adapter_id: str, question: Question, token_ids: list[int], version: str | None
    ) -> None:
        self.tally.tokens += len(token_ids)
        if not self.catalogue.is_answer(adapter_id, question, token_ids, version):
            self.tally.violations.append(
                f"wrong tokens of {adapter_id!r} ({version}) for {question}: {token_ids}"
            )
