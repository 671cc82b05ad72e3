"""Compiles kernels side by side, before the launches that would compile one after the other."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton import knobs


def compile_ahead(launch: Callable[[], None]) -> int:
    """Compile every kernel that `launch` launches, none of which runs; returns their number.

    What the kernels would have written stays as it was. Compiled kernels are kept by Triton, in
    this process and in its cache on disk; what the cache holds is only read.
    """
    wanted: dict[str, Any] = {}  # kernels by what Triton specializes them for

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        wanted[compile["specialization_data"]] = fn.jit_function
        return True  # go on without the kernel

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        launch()
    # Triton holds Python's lock for about a fifth of a compilation, so threads are enough.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(kernel.preload, data) for data, kernel in wanted.items()]:
            done.result()
    return len(wanted)
