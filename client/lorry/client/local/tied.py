"""Become a command that ends with the process that started it: ``python tied.py PID COMMAND...``.

Run as a file, before anything of lorry is loaded. Without it, services whose `lorry up` was killed
would go on, and hold the directories and ports of the next one.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent_pid, *command = sys.argv[1:]
    # The kernel sends the signal, which a service takes as a request to drain, even if the parent
    # had no time to. It survives the exec.
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent_pid):  # it died before the call above
        sys.exit("the process that started this one is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
