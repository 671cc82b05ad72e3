"""Memory that was freed stays for the next buffer."""

import subprocess
import sys

from tests.support.command import child_environment

ROUNDS, BUFFERS = 100, 4  # at a time: more than a heap keeps by itself
PAGES = (1 << 20) // 4096
PROGRAM = f"""
import resource
from lorry.rpc.heap import keep_freed_memory

keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    held = [bytearray(1 << 20) for _ in range({BUFFERS})]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_buffers_of_a_mebibyte_are_not_given_back_each_time() -> None:
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.check_output(command, env=child_environment(), text=True, timeout=60)
    assert int(output) < ROUNDS * BUFFERS * PAGES / 10
