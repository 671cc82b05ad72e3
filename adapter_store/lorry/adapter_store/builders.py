"""A bounded pool of builder processes, so that no stranger's bytes keep the event loop busy."""

import asyncio
import base64
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from google.rpc import status_pb2

from lorry.adapter_store.image import image_bytes
from lorry.adapter_store.layout_json import layout_to_json
from lorry.adapter_store.lora import LoraSpec
from lorry.kernels.page_layout import Dtype, ModelGeometry, PageLayout
from lorry.rpc.errors import AdapterInvalid, StoreUnavailable
from lorry.rpc.status import from_status

CONFIG_LIMIT_S = 5  # 64 KiB of ranks need half a second of an idle processor
MIN_BYTES_PER_S = 20 << 20  # slower than any disk that is worth serving from
MAX_REPLY_BYTES = 1 << 20
START_S = 10.0  # for a process, before the time of its first request begins
EXIT_S = 1.0


class BuilderTimeout(Exception):
    """A request took longer than its limit."""


class Checked(NamedTuple):
    """What a builder found out about uploaded weights."""

    digest: bytes
    weights_bytes: int
    file_crc32c: int


class Builders:
    """Runs `lorry.adapter_store.builder` in up to `processes` processes, started when needed."""

    def __init__(self, geometry: ModelGeometry, *, processes: int, niceness: int = 0) -> None:
        """With `niceness` the processes yield the CPU to those that have less."""
        self._geometry, self._niceness = geometry, niceness
        self._free = asyncio.Semaphore(processes)
        self._idle: list[asyncio.subprocess.Process] = []

    async def check_config(self, config_json: str) -> LoraSpec:
        """Resolve an adapter_config.json; raises AdapterInvalid."""
        try:
            spec = await self._call("check_config", CONFIG_LIMIT_S, config=config_json)
        except BuilderTimeout as error:
            raise AdapterInvalid.of(
                "config_json", f"its patterns take longer than {CONFIG_LIMIT_S} s to match"
            ) from error
        return LoraSpec.from_json(spec)

    async def check_weights(
        self, weights: Path, *, num_bytes: int, sha256: bytes, spec: LoraSpec, dtype: Dtype
    ) -> Checked:
        """Check an uploaded file; raises AdapterInvalid, DigestMismatch or StoreUnavailable."""
        found = await self._call_on_bytes(
            "check_weights",
            num_bytes,
            weights=str(weights),
            sha256=sha256.hex(),
            spec=spec.to_json(),
            dtype=dtype.value,
        )
        return Checked(bytes.fromhex(found["digest"]), found["weights_bytes"], found["crc32c"])

    async def build(
        self, image: Path, *, weights: Path, crc32c: int, spec: LoraSpec, layout: PageLayout
    ) -> int:
        """Pack into the preallocated file `image`; returns its CRC-32C.

        Raises DigestMismatch or StoreUnavailable.
        """
        checksum: int = await self._call_on_bytes(
            "build",
            image_bytes(spec, layout),
            weights=str(weights),
            image=str(image),
            crc32c=crc32c,
            spec=spec.to_json(),
            layout=layout_to_json(layout),
        )
        return checksum

    async def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            await _end(self._idle.pop())

    async def _call_on_bytes(self, operation: str, num_bytes: int, **request: Any) -> Any:
        """A call that may take as long as its bytes do; more raises StoreUnavailable."""
        try:
            return await self._call(operation, _limit_s(num_bytes), **request)
        except BuilderTimeout as error:
            raise StoreUnavailable(str(error)) from error

    async def _call(self, operation: str, limit_s: int, **request: Any) -> Any:
        line = json.dumps({"operation": operation, "limit_s": limit_s, **request}) + "\n"
        async with self._process() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            reply = b""
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(limit_s + START_S):
                    process.stdin.write(line.encode())
                    await process.stdin.drain()
                    reply = await process.stdout.readline()
            if not reply:
                raise _failure(operation, await _exit_code(process))
        answer = json.loads(reply)
        if "status" in answer:
            raise from_status(status_pb2.Status.FromString(base64.b64decode(answer["status"])))
        return answer["result"]

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """A process of one's own; it is ended if the block fails or is cancelled."""
        async with self._free:
            while self._idle and self._idle[-1].returncode is not None:
                self._idle.pop()
            process = self._idle.pop() if self._idle else await self._start()
            try:
                yield process
            except BaseException:
                await _end(process)
                raise
            self._idle.append(process)

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lorry.adapter_store.builder",
            json.dumps(asdict(self._geometry)),
            str(self._niceness),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_REPLY_BYTES,
            process_group=0,  # Ctrl-C is not for it; niceness counts within a session only
        )


def _failure(operation: str, returncode: int | None) -> Exception:
    if returncode == -signal.SIGALRM:
        return BuilderTimeout(f"{operation} took longer than its limit")
    return StoreUnavailable(f"a builder ended in {operation}")


def _limit_s(num_bytes: int) -> int:
    return 60 + num_bytes // MIN_BYTES_PER_S


async def _exit_code(process: asyncio.subprocess.Process) -> int | None:
    """How a process ended that says nothing more; it is ended if it does not by itself.

    It is not killed at once: asyncio loses the exit code of a process that has just died by then.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(EXIT_S):
            await process.wait()
    await _end(process)
    return process.returncode


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
