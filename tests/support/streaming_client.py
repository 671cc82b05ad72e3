"""A client that streams until it is killed."""

import asyncio
import sys

from demo import tasks
from lorry.client import Client, Request

LONG = Request(prompt=tasks.make_prompt("lorry"), max_tokens=900, ignore_eos=True)


async def stream(client: Client, started: asyncio.Semaphore) -> None:
    async with client.stream(LONG, timeout_s=600) as chunks:
        async for _ in chunks:
            started.release()


async def main(router: str, num_streams: int) -> None:
    """Print a line once all streams have had tokens."""
    started = [asyncio.Semaphore(0) for _ in range(num_streams)]
    async with Client(router=router) as client, asyncio.TaskGroup() as group:
        for each in started:
            group.create_task(stream(client, each))
        for each in started:
            await each.acquire()
        print("streaming", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
