"""Sends a trace's requests at their times, whatever became of the ones before: an open loop."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorry.client.bench.record import OK, Record
from lorry.client.bench.trace import NO_ADAPTER, TraceRequest
from lorry.client.client import Client
from lorry.client.generation import Request
from lorry.client.retry import RetryPolicy
from lorry.rpc.errors import LorryError

ONE_ATTEMPT = RetryPolicy(attempts=1)  # what fails is counted, not tried again


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The token ids that prompts are drawn from, both ends included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"token ids must ascend from at least 0, got {self.low}-{self.high}")

    @classmethod
    def parse(cls, text: str) -> "TokenRange":
        """``LOW-HIGH``; raises ValueError naming the text."""
        low, _, high = text.partition("-")
        try:
            return cls(int(low), int(high))
        except ValueError as error:
            raise ValueError(f"token ids must be LOW-HIGH, got {text!r}") from error

    def prompt(self, num_tokens: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(self.low, self.high + 1), k=num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    token_ids: TokenRange
    timeout_s: float  # of each request
    max_open: int  # streams at a time; beyond them requests are sent late, and counted from plan


class Load:
    """One process's share of a run. `on_end` hears of each record as its request ends."""

    def __init__(
        self,
        clients: Mapping[str, Client],  # by tenant
        adapters: Mapping[str, Sequence[str]],  # names, by tenant
        options: LoadOptions,
        on_end: Callable[[Record], None],
    ) -> None:
        self._clients = clients
        self._adapters = adapters
        self._options = options
        self._on_end = on_end
        self._room = asyncio.Semaphore(options.max_open)
        self._start_s = 0.0
        self.sent = 0

    async def run(self, records: Sequence[Record], start_s: float) -> None:
        """Send each request of `records` by its arrival from `start_s` on, of time.monotonic."""
        self._start_s = start_s
        async with asyncio.TaskGroup() as group:
            for record in records:
                await asyncio.sleep(record.planned.arrival_s - self._now_s())
                await self._room.acquire()
                group.create_task(self._send(record))

    async def _send(self, record: Record) -> None:
        record.sent_s = self._now_s()
        self.sent += 1
        try:
            await self._generate(record)
            record.code = OK
        except LorryError as error:
            record.code, record.reason = error.code.name, error.reason
        finally:
            record.ended_s = self._now_s()
            self._room.release()
            self._on_end(record)

    async def _generate(self, record: Record) -> None:
        client = self._clients[record.planned.tenant]
        async with client.stream(self._request(record)) as stream:
            async for chunk in stream:
                if chunk.token_ids:
                    record.last_token_s = self._now_s()
                    record.output_tokens += len(chunk.token_ids)
                    if record.first_token_s is None:
                        record.first_token_s = record.last_token_s

    def _request(self, record: Record) -> Request:
        planned = record.planned
        return Request(
            prompt=self._options.token_ids.prompt(planned.prompt_tokens, record.index),
            adapter=self._adapter(planned),
            max_tokens=planned.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            slo_ttft_s=_asked(record.slo.ttft_s),
            slo_tpot_s=_asked(record.slo.tpot_s),
        )

    def _adapter(self, planned: TraceRequest) -> str:
        if planned.adapter == NO_ADAPTER:
            return ""
        return self._adapters[planned.tenant][planned.adapter]

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s


def _asked(slo_s: float) -> float | None:
    return slo_s if math.isfinite(slo_s) else None
