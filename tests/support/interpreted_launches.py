"""Notes which kernels are launched under TRITON_INTERPRET=1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime.interpreter import GridExecutor


@contextmanager
def interpreted_launches() -> Iterator[list[str]]:
    """The kernels' names, in the order of their launches within it."""
    names: list[str] = []
    run = GridExecutor.__call__

    def noting(self: Any, *arguments: Any, **options: Any) -> None:
        names.append(self.fn.__name__)
        run(self, *arguments, **options)

    with mock.patch.object(GridExecutor, "__call__", noting):
        yield names
