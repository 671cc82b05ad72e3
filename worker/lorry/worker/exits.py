"""How processes ended, in words."""

import signal
from collections.abc import Mapping

MEANING_OF_SIGNAL: Mapping[int, str] = {
    signal.SIGKILL: ", as when the machine is out of memory",
    signal.SIGBUS: ", as when shared memory is full, or a mapped file became shorter",
}


def describe_exit(code: int) -> str:
    """An exit code as subprocess knows it, with what a signal is and mostly means."""
    if code >= 0:
        return f"exit code {code}"
    return f"exit code {code} ({signal.strsignal(-code)}{MEANING_OF_SIGNAL.get(-code, '')})"
