"""Compiles kernels side by side, before the launches that would compile one after the other."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction


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

    with knobs.runtime.scope(), _no_launches():
        knobs.runtime.jit_cache_hook = note
        launch()
    return [threads.submit(kernel.preload, data) for data, kernel in wanted.items()]


@contextmanager
def _no_launches() -> Iterator[None]:
    """Within it, kernels that were compiled before do not run either.

    They would read what those that are not compiled yet have not written.
    """
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
