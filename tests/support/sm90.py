"""Compile what launchers would launch, for a Hopper GPU, on a machine without one."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT_BYTES = 227 * 1024
WAIT, TOUCH = (
    re.compile(r"griddepcontrol\.wait"),
    re.compile(r"(?:ld(?!\.global\.cg)|st|atom|red|cp)\.[\w.]*global"),  # `load_early` apart
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel's machine code and what it takes of a multiprocessor."""

    name: str
    shared_bytes: int
    registers: int
    local_bytes: int  # stack and spills
    is_dependent: bool  # launched while the kernels before it run
    waits_first: bool  # for those to complete, before it touches memory
    cubin: bytes


class _AbsentGpu:
    """As much of a driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Within it, a launch compiles its kernel, adds it to the list and runs nothing."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None:  # as where a hook of Triton's takes its place
            compiled.append(_measure(kernel))

    previous = driver._active
    driver.set_active(cast(DriverBase, _AbsentGpu()))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield compiled
    finally:
        driver._active = previous


def _measure(kernel) -> Compiled:
    cubin = kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"([A-Z]+):(\d+)", usage))
    return Compiled(
        kernel.metadata.name,
        kernel.metadata.shared,
        int(fields["REG"]),
        int(fields["STACK"]) + int(fields["LOCAL"]),
        kernel.metadata.launch_pdl,
        _waits_first(kernel.asm["ptx"]),
        cubin,
    )


def _waits_first(ptx: str) -> bool:
    wait, touch = WAIT.search(ptx), TOUCH.search(ptx)
    return wait is not None and (touch is None or wait.start() < touch.start())
