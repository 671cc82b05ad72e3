"""A tensor-parallel worker beside one that is not: what it loses, the other one finishes."""

import asyncio
from pathlib import Path

import psutil

from demo import tasks
from lorry.client import Request
from tests.support.fleet import MAX_RUNNING, Fleet
from tests.support.processes import Service
from tests.support.waiting import until

NUM_STREAMS = 2 * MAX_RUNNING  # so that both workers run some
NUM_TOKENS = 100


def other_rank_of(worker: Service) -> psutil.Process:
    [rank] = [
        process
        for process in psutil.Process(worker.pid).children()
        if "lorry.worker.rank_process" in process.cmdline()
    ]
    return rank


async def test_streams_of_a_killed_rank_go_on_elsewhere_with_the_same_tokens(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path, 2)
    ranked = fleet.workers[0]
    ranked.options += ("--tensor-parallel", "2")
    num_begun = 0

    async def read(number: int) -> list[int]:
        nonlocal num_begun
        prompt, token_ids = tasks.make_prompt(f"lorry {number}"), list[int]()
        request = Request(
            prompt=prompt, adapter="", max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0
        )
        async with client.stream(request, timeout_s=120) as stream:
            async for chunk in stream:
                num_begun += not token_ids
                token_ids += chunk.token_ids
        return token_ids

    try:
        await fleet.start()
        async with fleet.client() as client, asyncio.TaskGroup() as group:
            streams = [group.create_task(read(number)) for number in range(NUM_STREAMS)]
            await until(lambda: num_begun == NUM_STREAMS)
            assert not all(stream.done() for stream in streams)
            other_rank_of(ranked).kill()
        assert await ranked.wait() == 1
        async with fleet.client() as client:
            again = await asyncio.gather(*map(read, range(NUM_STREAMS)))
        assert [stream.result() for stream in streams] == again
    finally:
        await fleet.stop()
    log = ranked.log.read_text()
    assert "tensor-parallel rank 1 ended with exit code -9 (Killed" in log
