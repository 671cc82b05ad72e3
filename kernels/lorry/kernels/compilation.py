"""Compiles kernels side by side, before the launches that would compile one after the other."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from triton import knobs


def compile_ahead(launch: Callable[[], None], threads: Executor) -> list[Future[Any]]:
    """Compile, in `threads`, every kernel that `launch` launches; none of them runs.

    What they would have written stays as it was, so nothing that `launch` does may depend on it.
    Triton keeps what it compiles, in this process and in its cache on disk, and only reads what
    that cache holds. It holds Python's lock for about a fifth of a compilation.
    """
    wanted: dict[str, Any] = {}  # kernels by what Triton specializes them for

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        wanted[compile["specialization_data"]] = fn.jit_function
        return True  # go on without the kernel

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        launch()
    return [threads.submit(kernel.preload, data) for data, kernel in wanted.items()]
