import os
import subprocess
import sys
import threading

import pytest

from lorry.worker.ring import RecordTooLarge, Ring, RingFull, RingHandle

ECHO = """
import sys
from lorry.worker.ring import Ring, RingHandle
source, target = (Ring.attach(*RingHandle.parse(text)) for text in sys.argv[1:])
received = 0
while received < 5000:
    assert source.wait(20)
    for record in source.read_all():
        target.write(record[::-1], timeout_s=20)
        received += 1
"""


@pytest.fixture
def ring():
    ring = Ring.create(capacity=256)
    yield ring
    ring.close()


def test_records_come_out_in_order_and_unchanged(ring):
    records = [b"", b"a", bytes(range(100))]
    assert all(ring.try_write(record) for record in records)
    assert ring.read_all() == records
    assert ring.read_all() == []


def test_a_record_without_room_is_refused_until_the_reader_makes_some(ring):
    assert ring.try_write(b"x" * 200)
    assert not ring.try_write(b"y" * 100)
    assert ring.read_all() == [b"x" * 200]
    assert ring.try_write(b"y" * 100)
    assert ring.read_all() == [b"y" * 100]


def test_records_wrap_around_the_end_at_every_position(ring):
    for length in range(240):
        record = os.urandom(length)
        assert ring.try_write(record)
        assert ring.read_all() == [record]


def test_a_ring_can_be_filled_to_the_last_byte(ring):
    assert ring.try_write(b"x" * 248)
    assert not ring.try_write(b"")
    assert ring.read_all() == [b"x" * 248]


def test_a_record_that_never_fits_is_an_error(ring):
    with pytest.raises(RecordTooLarge):
        ring.try_write(b"x" * 249)


def test_write_gives_up_when_the_reader_makes_no_room(ring):
    ring.write(b"x" * 200, timeout_s=1)
    with pytest.raises(RingFull):
        ring.write(b"x" * 200, timeout_s=0.05)


def test_write_waits_for_room(ring):
    ring.write(b"x" * 200, timeout_s=1)
    timer = threading.Timer(0.05, ring.read_all)
    timer.start()
    ring.write(b"y" * 200, timeout_s=10)
    timer.join()
    assert ring.read_all() == [b"y" * 200]


def test_wait_tells_whether_something_was_written_since_the_last_read(ring):
    assert not ring.wait(0)
    ring.try_write(b"x")
    assert ring.wait(0)
    ring.read_all()
    assert not ring.wait(0)


def test_attaching_with_another_capacity_is_refused(ring):
    memory_fd, event_fd, _ = ring.handle
    with pytest.raises(ValueError, match="512 bytes"):
        Ring.attach(memory_fd, event_fd, 512)


def test_the_memory_cannot_be_truncated_under_a_reader(ring):
    with pytest.raises(PermissionError):
        os.ftruncate(ring.handle.memory_fd, 0)


def test_a_handle_survives_the_command_line():
    handle = RingHandle(3, 4, 4096)
    assert RingHandle.parse(str(handle)) == handle


def write_all(ring, records):
    for record in records:
        ring.write(record, timeout_s=20)


def test_two_processes_pass_thousands_of_records_through_small_rings():
    there, back = Ring.create(4096), Ring.create(4096)
    fds = [*there.handle[:2], *back.handle[:2]]
    command = [sys.executable, "-c", ECHO, str(there.handle), str(back.handle)]
    records = [os.urandom(index % 301) for index in range(5000)]
    with subprocess.Popen(command, pass_fds=fds) as process:
        writer = threading.Thread(target=write_all, args=(there, records))
        writer.start()
        received: list[bytes] = []
        while len(received) < len(records) and back.wait(20):
            received += back.read_all()
        writer.join()
        assert process.wait(20) == 0
    there.close()
    back.close()
    assert received == [record[::-1] for record in records]
