"""A worker of two GPUs: it answers like one of one GPU, and ends whole when a rank is lost.

Needs two GPUs of one host; with fewer all of it is deselected (tests/gpu/conftest.py).
"""

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.other_ranks import other_ranks
from lorry.rpc.base_model import BaseModel
from lorry.rpc.errors import WorkerLost
from lorry.worker.building import build_engine
from lorry.worker.config import EngineConfig
from lorry.worker.cuda_runner import CudaRunner
from lorry.worker.engine import Engine
from lorry.worker.leading_runner import LeadingRunner
from tests.support.command import REPO
from tests.support.engines import EngineHarness, ImageHarness
from tests.support.equal_tokens import ADAPTERS, MODELS, World, check_answers
from tests.support.rank_workers import attached_worker, ranks_of
from tests.support.worker_process import worker_process

pytestmark = pytest.mark.gpus(2)

DEVICE = "cuda"
DEMO = REPO / "demo" / "model"
OPTIONS = ("--device=cuda", "--tensor-parallel=2", "--max-running=16", "--step-tokens=64")
END_S = 10.0  # from the loss of a rank to the worker's end
BUSY_REQUESTS = 64  # that keep a worker busy for several of the statuses it sends
GIB = 1 << 30
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.9},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.6, "min_p": 0.02},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.7, "logit_bias": {5: 4.0, 200: 6.0, 319: -100.0}},
    {"min_tokens": 12, "stop_token_ids": [7, 160, 161]},
    {"top_logprobs": 20, "prompt_logprobs": 3},
]


class TwoGpuHarness(EngineHarness):
    """The first rank is in this process, the other one in another; close it."""

    def build(self, config: EngineConfig, base_model: BaseModel) -> Engine:
        self._stack = contextlib.ExitStack()
        return build_engine(config, base_model, self._stack.enter_context(other_ranks(config)))

    def close(self) -> None:
        torch.cuda.synchronize()
        runner = self.engine.runner
        assert isinstance(runner, LeadingRunner)
        assert isinstance(runner.local, CudaRunner)
        runner.local.graphs.close()
        self._stack.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), MODELS["gqa-tied"])


@contextlib.contextmanager
def two_gpus(model: Path, directory: Path, **config: Any) -> Iterator[TwoGpuHarness]:
    defaults: dict[str, Any] = {"device": DEVICE, "dtype": "fp32", "step_tokens": 64}
    # A process has one group of symmetric memory, and these tests have many engines in one.
    fields = defaults | {"tensor_parallel": 2, "one_shot_sums": False} | config
    with contextlib.closing(TwoGpuHarness(model, directory, **fields)) as harness:
        yield harness


def largest_pages(
    model: Path, directory: Path, adapters: Sequence[Path | None], strategy: str
) -> int:
    harness = ImageHarness(model, directory, tensor_parallel=2, lora_strategy=strategy)
    return max(harness.image_pages(adapter) for adapter in adapters if adapter is not None)


@pytest.mark.parametrize("strategy", ["replicated", "slora"])
def test_all_adapters_come_and_go(world: World, tmp_path: Path, strategy: str) -> None:
    """Of ranks 1 to 256, in overlapped replays of graphs."""
    with two_gpus(world.model, tmp_path, lora_strategy=strategy) as harness:
        check_answers(world, harness)
        runner = harness.engine.runner
        assert runner.max_in_flight == 2
        assert runner.counts.graph_replays == harness.engine.scheduler.steps
        status = harness.engine.status()
        assert status.max_adapters_beside_base_in_step == len(ADAPTERS)
    pages = largest_pages(world.model, tmp_path, world.adapters, strategy) + 40
    with two_gpus(world.model, tmp_path, lora_strategy=strategy, pool_pages=pages) as harness:
        for _ in range(2):
            check_answers(world, harness)
        assert harness.engine.status().adapter_evictions > 0


@pytest.mark.parametrize("strategy", ["replicated", "slora"])
def test_preempted_requests_go_on_alike(world: World, tmp_path: Path, strategy: str) -> None:
    few = world.adapters[:3]

    def submit(harness: EngineHarness) -> None:
        for index in range(8):
            prompt = list(range(3 + index, 13 + index))
            harness.submit(prompt, few[index % 3], max_tokens=90, stop_token_ids=[])
        harness.run()

    alone = EngineHarness(world.model, tmp_path, device=DEVICE, dtype="fp32", step_tokens=64)
    submit(alone)
    pages = largest_pages(world.model, tmp_path, few, strategy) + 30
    with two_gpus(
        world.model, tmp_path, lora_strategy=strategy, pool_pages=pages, max_running=8
    ) as harness:
        submit(harness)
    assert harness.tokens == alone.tokens
    assert harness.engine.scheduler.preemptions > 0


def test_every_way_of_drawing(world: World, tmp_path: Path) -> None:
    def submit(harness: EngineHarness) -> None:
        for index, fields in enumerate(SAMPLING):
            prompt = list(range(3 + index, 20 + 2 * index))
            harness.submit(prompt, world.adapters[index % 3], max_tokens=16, **fields)
        harness.run()

    alone = EngineHarness(world.model, tmp_path, device=DEVICE, dtype="fp32", step_tokens=64)
    submit(alone)
    with two_gpus(world.model, tmp_path, lora_strategy="slora") as harness:
        submit(harness)
    assert harness.tokens == alone.tokens
    for number, rows in alone.logprobs.items():
        for actual, expected in zip(harness.logprobs[number], rows, strict=True):
            assert actual.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert actual.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)
    for number, rows in alone.prompt_logprobs.items():
        got = [row.logprob for row in harness.prompt_logprobs[number]]
        assert got == pytest.approx([row.logprob for row in rows], abs=1e-4)


def test_steady_steps_never_wait_for_the_device(world: World, tmp_path: Path) -> None:
    with two_gpus(world.model, tmp_path) as harness:
        for _ in range(20):
            harness.submit(list(range(3, 20)), world.adapters[1], 200, stop_token_ids=[])
        for _ in range(30):
            harness.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(50):
                harness.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        harness.run()


def test_a_worker_answers_like_one_gpu_with_one_shot_sums(tmp_path: Path) -> None:
    prompts = [[5, 6, 7], list(range(3, 60)), list(range(9, 200))]
    options = (*OPTIONS, "--dtype=fp32", "--pool-pages=2000")
    alone = EngineHarness(DEMO, tmp_path, device=DEVICE, dtype="fp32", step_tokens=64)
    numbers = [alone.submit(prompt, max_tokens=40, stop_token_ids=[]) for prompt in prompts]
    alone.run()

    async def answers() -> tuple[list[list[int]], str]:
        async with attached_worker(DEMO, *options, timeout_s=200) as (worker, router):
            seqs = [await router.submit(prompt, max_tokens=40) for prompt in prompts]
            await router.until(lambda: all(seq in router.finished for seq in seqs))
            return [router.tokens[seq] for seq in seqs], "".join(worker.log)

    tokens, log = asyncio.run(answers())
    assert tokens == [alone.tokens[number] for number in numbers]
    for told in ("bytes are one-shot", "summed and normed in one kernel"):
        assert (told in log) == torch.cuda.can_device_access_peer(0, 1), log


def lose_a_rank(lost: int, sent: signal.Signals) -> str:
    """The log of a worker whose rank gets a signal while it computes."""

    async def lose() -> str:
        async with attached_worker(DEMO, *OPTIONS, "--pool-pages=2000", timeout_s=200) as (
            worker,
            router,
        ):
            ranks = ranks_of(worker)
            assert len(ranks) == 2
            for _ in range(BUSY_REQUESTS):
                await router.submit([5, 6, 7], min_tokens=900, max_tokens=900)
            await router.until(lambda: bool(router.last_status.running))
            sent_s = time.monotonic()
            ranks[lost].send_signal(sent)
            assert isinstance(await router.until_ended(), WorkerLost)
            assert await asyncio.to_thread(worker.wait) == 1
            assert time.monotonic() - sent_s < END_S
            assert not any(rank.is_running() for rank in ranks)
            return "".join(worker.log)

    return asyncio.run(lose())


def test_the_worker_ends_when_a_rank_is_killed() -> None:
    log = lose_a_rank(1, signal.SIGKILL)
    assert re.search(r"ERROR \S+: tensor-parallel rank 1 ended with exit code -9", log), log
    log = lose_a_rank(0, signal.SIGKILL)
    assert re.search(r"ERROR \S+: the engine ended with exit code -9", log), log


@pytest.mark.parametrize("lost", [0, 1])
def test_the_worker_ends_when_a_rank_is_stopped(lost: int) -> None:
    log = lose_a_rank(lost, signal.SIGSTOP)
    silent = (
        rf"tensor-parallel rank {lost} \(process \d+\) has been silent for \d+ s; it is stopped"
    )
    assert re.search(rf"ERROR \S+: {silent}", log), log


def test_the_worker_ends_when_a_rank_is_out_of_memory() -> None:
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(1)
    taken = torch.empty(free_bytes - 2 * GIB, dtype=torch.uint8, device="cuda:1")
    try:
        with worker_process(DEMO, *OPTIONS, module="lorry.worker") as worker:
            assert worker.wait() == 1
        log = "".join(worker.log)
    finally:
        del taken
        torch.cuda.empty_cache()
    reason = r"tensor-parallel rank 1 failed: memory_fraction 0.9 leaves no room for a pool"
    assert re.search(rf"ERROR \S+: {reason}", log), log
