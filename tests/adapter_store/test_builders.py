"""Real builder processes, with requests that take too long, fail, or are abandoned."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import pytest

from lorry.adapter_store import builders as module
from lorry.adapter_store.builders import Builders
from lorry.adapter_store.peft_config import resolve
from lorry.kernels.page_layout import Dtype
from lorry.rpc.errors import AdapterInvalid, LorryError, StoreUnavailable
from tests.support.adapters import TINY, lora_config, lora_files, lora_tensors
from tests.support.waiting import until

CONFIG = lora_config()
PAGES_OF_A_MEBIBYTE = 256
# Backtracks for longer than anyone waits, on names like model.layers.0.self_attn.q_proj.
ENDLESS = lora_config(targets=r"((((m|mo|o|d|e|l|\.|\w)+)+)+)+!")


@pytest.fixture
async def builders() -> AsyncIterator[Builders]:
    pool = Builders(TINY, processes=1)
    yield pool
    await pool.close()


def pids(builders: Builders) -> list[int]:
    return [process.pid for process in builders._idle]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_process_serves_many_requests(builders: Builders) -> None:
    for _ in range(3):
        assert await builders.check_config(json.dumps(CONFIG)) == resolve(CONFIG, TINY)
        with pytest.raises(AdapterInvalid, match="config_json"):
            await builders.check_config("{")
    assert len(pids(builders)) == 1


async def test_a_pattern_that_takes_too_long_is_refused_and_its_process_ended(
    builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONFIG_LIMIT_S", 1)
    await builders.check_config(json.dumps(CONFIG))
    (pid,) = pids(builders)
    with pytest.raises(AdapterInvalid, match="take longer than 1 s"):
        await builders.check_config(json.dumps(ENDLESS))
    assert not is_running(pid)
    await builders.check_config(json.dumps(CONFIG))


async def test_weights_that_take_too_long_are_the_stores_failure(
    builders: Builders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which all callers know, and go on after."""
    monkeypatch.setattr(module, "_limit_s", lambda num_bytes: 1)
    await builders.check_config(json.dumps(CONFIG))
    (pid,) = pids(builders)
    endless = tmp_path / "endless"
    os.mkfifo(endless)  # to open it waits for a writer
    spec = resolve(CONFIG, TINY)
    with pytest.raises(StoreUnavailable, match="check_weights took longer than its limit"):
        await builders.check_weights(endless, num_bytes=1, sha256=b"", spec=spec, dtype=Dtype.FP32)
    assert not is_running(pid)
    await builders.check_config(json.dumps(CONFIG))


async def test_an_abandoned_request_ends_its_process(builders: Builders) -> None:
    await builders.check_config(json.dumps(CONFIG))
    (pid,) = pids(builders)
    call = asyncio.create_task(builders.check_config(json.dumps(ENDLESS)))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: not is_running(pid))
    await builders.check_config(json.dumps(CONFIG))


async def test_a_killed_process_fails_its_request_only(builders: Builders) -> None:
    await builders.check_config(json.dumps(CONFIG))
    (pid,) = pids(builders)
    call = asyncio.create_task(builders.check_config(json.dumps(ENDLESS)))
    await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StoreUnavailable):
        await call
    await builders.check_config(json.dumps(CONFIG))


async def test_no_more_processes_run_than_allowed(builders: Builders) -> None:
    await asyncio.gather(*(builders.check_config(json.dumps(CONFIG)) for _ in range(5)))
    assert len(pids(builders)) == 1


async def test_closing_ends_the_processes(builders: Builders) -> None:
    await builders.check_config(json.dumps(CONFIG))
    (pid,) = pids(builders)
    await builders.close()
    assert not is_running(pid)


async def test_a_niceness_counts_against_the_store_itself() -> None:
    """A system that groups processes by session weighs it within one only."""
    nice = Builders(TINY, processes=1, niceness=10)
    await nice.check_config(json.dumps(CONFIG))
    (pid,) = pids(nice)
    store_niceness = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, store_niceness + 10)
    assert os.getsid(pid) == os.getsid(0)
    await nice.close()


async def test_checks_take_their_arrays_from_memory_that_was_freed(tmp_path: Path) -> None:
    """Page faults of a process that others wait for as long as each takes."""
    geometry = replace(TINY, layers=4, hidden=4096, heads=64, head_dim=64)
    config = lora_config(r=64, targets=["q_proj"])
    tensors = lora_tensors(config, geometry, dtype=ml_dtypes.bfloat16)
    weights = lora_files(config, tensors)[1]
    path = tmp_path / "weights"
    path.write_bytes(weights)
    pool = Builders(geometry, processes=1)
    faults = [0]
    for _ in range(3):
        await pool.check_weights(
            path,
            num_bytes=len(weights),
            sha256=sha256(weights).digest(),
            spec=resolve(config, geometry),
            dtype=Dtype.FP32,
        )
        faults.append(page_faults(*pids(pool)))
    await pool.close()
    mebibytes_cast = 2 * geometry.layers
    assert faults[3] - faults[2] < mebibytes_cast * PAGES_OF_A_MEBIBYTE / 2


def page_faults(pid: int) -> int:
    """Of a process so far; those that took no disk."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


async def test_ctrl_c_at_the_store_leaves_its_processes_alone(builders: Builders) -> None:
    await builders.check_config(json.dumps(CONFIG))
    (pid,) = pids(builders)
    assert os.getpgid(pid) != os.getpgid(0)


async def test_a_defect_in_a_builder_reaches_nobody_in_its_words(
    builders: Builders, tmp_path: Path
) -> None:
    with pytest.raises(LorryError) as caught:
        await builders.check_weights(
            tmp_path / "absent",
            num_bytes=1,
            sha256=b"",
            spec=resolve(CONFIG, TINY),
            dtype=Dtype.FP32,
        )
    assert "absent" not in str(caught.value)
    assert caught.value.code.name == "INTERNAL"
