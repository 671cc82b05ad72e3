"""`lorry up`: the three services on this machine, until Ctrl-C."""

import asyncio
import os
import shlex
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lorry.client.console import make_console
from lorry.client.endpoints import (
    DEFAULT_STATE_FILE,
    STATE_FILE_VARIABLE,
    Endpoints,
    RunningServices,
    state_dir,
)
from lorry.client.local.display import Display
from lorry.client.local.stack import LocalStack, ServiceOptions, StackOptions, local_stack
from lorry.rpc.command import check_positive

STATE_DIR = state_dir()
MAX_PORT = 65535


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """What `lorry up` starts."""

    model: Annotated[Path, Parameter(env_var="LORRY_UP_MODEL")]
    """Hugging Face directory of the base model (config, tokenizer, safetensors)."""

    router_port: Annotated[int, Parameter(env_var="LORRY_UP_ROUTER_PORT")] = 50051
    """Port of the router on 127.0.0.1; 0 takes a free one."""

    store_port: Annotated[int, Parameter(env_var="LORRY_UP_STORE_PORT")] = 50052
    """Port of the adapter store on 127.0.0.1; 0 takes a free one."""

    worker_port: Annotated[int, Parameter(env_var="LORRY_UP_WORKER_PORT")] = 50053
    """Port of the worker on 127.0.0.1; 0 takes a free one."""

    data: Annotated[Path, Parameter(env_var="LORRY_UP_DATA")] = STATE_DIR / "adapters"
    """Directory in which the adapter store keeps adapters."""

    logs: Annotated[Path, Parameter(env_var="LORRY_UP_LOGS")] = STATE_DIR / "logs"
    """Directory for the services' logs, which start anew each time."""

    router_args: Annotated[
        str, Parameter(env_var="LORRY_UP_ROUTER_ARGS", allow_leading_hyphen=True)
    ] = ""
    """More options for the router, in quotes; `python -m lorry.router --help` lists them."""

    store_args: Annotated[
        str, Parameter(env_var="LORRY_UP_STORE_ARGS", allow_leading_hyphen=True)
    ] = ""
    """More options for the adapter store; see `python -m lorry.adapter_store --help`."""

    worker_args: Annotated[
        str, Parameter(env_var="LORRY_UP_WORKER_ARGS", allow_leading_hyphen=True)
    ] = ""
    """More options for the worker; see `python -m lorry.worker --help`."""

    ready_timeout_s: Annotated[float, Parameter(env_var="LORRY_UP_READY_TIMEOUT_S")] = 300.0
    """Seconds that all services may take to be ready."""

    grace_s: Annotated[float, Parameter(env_var="LORRY_UP_GRACE_S")] = 40.0
    """Seconds that each service may take to end after SIGTERM; then it is killed."""

    state_file: Annotated[Path, Parameter(env_var=STATE_FILE_VARIABLE)] = DEFAULT_STATE_FILE
    """Where the addresses are written for the other commands while the services run."""

    def __post_init__(self) -> None:
        for field in ("router_port", "store_port", "worker_port"):
            port = getattr(self, field)
            if not 0 <= port <= MAX_PORT:
                raise ValueError(f"{field} must be 0 to {MAX_PORT}, got {port}")
        check_positive(self, "ready_timeout_s", "grace_s")
        if not (self.model / "config.json").is_file():
            raise ValueError(
                f"model must be a directory with a config.json, got {str(self.model)!r}"
            )

    def stack_options(self) -> StackOptions:
        backend = ["--backend", self.data.resolve().as_uri()]
        return StackOptions(
            model=self.model.resolve(),
            logs=self.logs,
            store=ServiceOptions(
                port=self.store_port, arguments=[*backend, *shlex.split(self.store_args)]
            ),
            worker=ServiceOptions(port=self.worker_port, arguments=shlex.split(self.worker_args)),
            router=ServiceOptions(port=self.router_port, arguments=shlex.split(self.router_args)),
            grace_s=self.grace_s,
        )


async def up(config: UpConfig) -> None:
    """Run router, adapter store and worker on this machine until Ctrl-C or SIGTERM.

    If one of them ends, the others are stopped too and the command exits with 1. A second
    Ctrl-C does not wait for running requests.
    """
    if running := RunningServices.read(config.state_file):
        raise ValueError(
            f"`lorry up` already runs here (process {running.pid}); "
            "stop it, or give this one another --state-file and ports"
        )
    for directory in (config.logs, config.data):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    display = Display(make_console())
    with display.live():
        async with local_stack(config.stack_options(), display.on_change) as stack:
            stop = _stop_on_signals(stack)
            await _race(_serve(stack, config, display), stack.watch(), stop.wait())
            display.announce("stopping")


async def _serve(stack: LocalStack, config: UpConfig, display: Display) -> None:
    endpoints = await stack.start(timeout_s=config.ready_timeout_s)
    running = RunningServices(pid=os.getpid(), endpoints=endpoints)
    with running.recorded(config.state_file):
        display.announce(_ready_line(endpoints))
        await asyncio.get_running_loop().create_future()  # until it is cancelled


def _ready_line(endpoints: Endpoints) -> str:
    return f"ready: router {endpoints.router}, adapter store {endpoints.store}. Ctrl-C stops all."


def _stop_on_signals(stack: LocalStack) -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; another one kills the services at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            stack.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


async def _race(*work: Coroutine[Any, Any, Any]) -> None:
    """Run all until the first ends or fails, then cancel the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
