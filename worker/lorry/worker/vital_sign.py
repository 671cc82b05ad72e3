"""A process's sign of life: a thread that counts an eventfd up, whatever the others wait for.

It tells a process that is stopped or swapped out from one that waits for another rank.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

BEAT_S = 0.5


@contextlib.contextmanager
def beating(event_fd: int) -> Iterator[None]:
    """Count `event_fd`, which is not blocking, up every half second."""
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_S):
            os.eventfd_write(event_fd, 1)

    thread = threading.Thread(target=beat, name="vital-sign", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
