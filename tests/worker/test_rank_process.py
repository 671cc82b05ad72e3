"""A worker of two tensor-parallel processes: it serves, and it ends whole when one is lost."""

import asyncio
import json
import re
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lorry.rpc.base_model import read_base_model
from lorry.rpc.errors import WorkerLost
from tests.support.engines import EngineHarness
from tests.support.image_store import ImageStore, serving_images
from tests.support.models import make_adapter, make_llama
from tests.support.rank_workers import attached_worker, ranks_of

OPTIONS = ("--threads=1", "--tensor-parallel=2", "--pool-pages=400", "--lora-strategy=slora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


async def test_two_processes_serve_an_adapter_and_end_on_sigterm(
    model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a", model, seed=1, r=5, target_modules="all-linear")
    alone = EngineHarness(model, tmp_path)
    number = alone.submit([5, 6, 7], adapter, max_tokens=12, stop_token_ids=[])
    alone.run()
    store = ImageStore(read_base_model(model), tmp_path)
    version = store.add(
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    async with serving_images(store) as address:
        options = (f"--store={address}", f"--shm-dir={tmp_path / 'elsewhere'}")
        (tmp_path / "elsewhere").mkdir()
        async with attached_worker(model, *OPTIONS, *options) as (worker, router):
            seq = await router.submit([5, 6, 7], version=version, max_tokens=12)
            await router.until(lambda: seq in router.finished)
            assert router.tokens[seq] == alone.tokens[number]
            ranks = ranks_of(worker)
            assert len(ranks) == 2
            worker.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait) == 0
    assert not any(rank.is_running() for rank in ranks)


async def test_a_stopped_rank_ends_the_worker_and_is_named(model: Path) -> None:
    async with attached_worker(model, *OPTIONS) as (worker, router):
        ranks = ranks_of(worker)
        await router.submit([5, 6, 7], max_tokens=1000)
        await router.until(lambda: bool(router.last_status.running))
        ranks[1].send_signal(signal.SIGSTOP)
        assert isinstance(await router.until_ended(), WorkerLost)
        assert await asyncio.to_thread(worker.wait) == 1
        log = "".join(worker.log)
    reason = r"tensor-parallel rank 1 \(process \d+\) has been silent for \S+ s; it is stopped"
    assert re.search(rf"ERROR \S+: {reason}", log), log
    assert not any(rank.is_running() for rank in ranks)


async def fail(model: Path, fault: str, *options: str) -> str:
    """The log of a worker whose second rank fails in its first step; it ends whole."""
    module = "tests.support.faulty_worker"
    async with attached_worker(
        model, *OPTIONS, *options, module=module, FAULTY_WORKER="none", FAULTY_RANK=fault
    ) as (worker, router):
        ranks = ranks_of(worker)
        await router.submit([5, 6, 7], max_tokens=10)
        assert isinstance(await router.until_ended(), WorkerLost)
        assert await asyncio.to_thread(worker.wait) == 1
        assert not any(rank.is_running() for rank in ranks)
        return "".join(worker.log)


async def test_the_front_says_why_a_rank_failed(model: Path) -> None:
    log = await fail(model, "out-of-memory")
    reason = "tensor-parallel rank 1 failed: the GPU is out of memory; lower memory_fraction"
    assert re.search(rf"ERROR \S+: {reason}", log), log


async def test_a_rank_that_hangs_but_lives_ends_the_worker_and_says_where(model: Path) -> None:
    log = await fail(model, "hang", "--engine-silence-s=4")
    assert re.search(r"ERROR \S+: the engine has been silent for 4 s", log), log
    assert re.search(r'faulty_rank.py", line \d+ in hang', log), log
    assert re.search(r'collectives.py", line \d+ in all_reduce', log), log
