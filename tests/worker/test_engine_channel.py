import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.worker import engine_channel
from lorry.worker.config import Config, EngineConfig
from lorry.worker.engine_channel import EngineArguments, EngineChannel, FrontGone
from lorry.worker.messages import Cancel, Codec, Command, FetchImage, Prefetch, Stop
from lorry.worker.ring import Ring

CONFIG = EngineConfig(model=Path("/models/a b"), pool_pages=7, max_context_tokens=4096)

# Starts a process that dies with it, tells that one's pid, and waits to be killed.
FRONT = """
import os, subprocess, sys, time
child = "import os, sys, time; from lorry.worker.engine_channel import die_with; "
child += "die_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child, str(os.getpid())])
time.sleep(60)
"""


@pytest.fixture
def rings():
    rings = Ring.create(4096), Ring.create(4096)
    yield rings
    for ring in rings:
        ring.close()


def test_arguments_survive_the_command_line(rings):
    arguments = EngineArguments(CONFIG, rings[0].handle, rings[1].handle, front_pid=12)
    assert EngineArguments.parse(arguments.to_argv()) == arguments


def test_commands_arrive_in_order_across_records(rings):
    channel, codec = EngineChannel(*rings), Codec()
    commands: list[Command] = [Prefetch([b"v"]), Cancel([1])]
    rings[0].try_write(codec.encode(commands))
    rings[0].try_write(codec.encode([Stop()]))
    assert channel.receive(timeout_s=1) == [Prefetch([b"v"]), Cancel([1]), Stop()]
    assert channel.receive(timeout_s=0) == []


def test_events_reach_the_front(rings):
    EngineChannel(*rings).send([FetchImage(b"v")])
    (record,) = rings[1].read_all()
    assert Codec().decode_events(record) == [FetchImage(b"v")]


def test_a_front_that_stops_reading_counts_as_gone(rings, monkeypatch):
    monkeypatch.setattr(engine_channel, "SEND_TIMEOUT_S", 0.05)
    channel = EngineChannel(*rings)
    channel.send([FetchImage(b"v" * 4000)])
    with pytest.raises(FrontGone):
        channel.send([FetchImage(b"v" * 4000)])


def test_the_engine_process_dies_with_the_front():
    with subprocess.Popen([sys.executable, "-c", FRONT], stdout=subprocess.PIPE) as front:
        assert front.stdout is not None
        engine_pid = int(front.stdout.readline())
        pidfd = os.pidfd_open(engine_pid)
        front.send_signal(signal.SIGKILL)
    ended, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert ended


def test_an_engine_whose_front_is_already_gone_does_not_start():
    code = "from lorry.worker.engine_channel import die_with; die_with(1)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert b"FrontGone" in process.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [("pool_pages", 0), ("max_rank", 257), ("max_waiting", -1), ("engine_silence_s", 0.0)],
)
def test_a_bad_option_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=rf"{field} .*{value}"):
        Config(model=Path("m"), **{field: value})
