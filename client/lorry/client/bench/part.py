"""One process of a run: reads its `Share` from stdin, writes `Progress` to stdout until its end.

python -m lorry.client.bench.part
"""

import asyncio
import contextlib
import sys
from pathlib import Path

from lorry.client.bench.load import ONE_ATTEMPT, Load, LoadOptions, TokenRange
from lorry.client.bench.messages import Progress, Share, read_share, read_start, write_progress
from lorry.client.bench.record import Record
from lorry.client.client import Client

REPORT_S = 0.2


async def run(share: Share) -> None:
    ended: list[Record] = []
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            tenant: await stack.enter_async_context(
                Client(
                    router=share.router,
                    token=token,
                    tls=Path(share.tls) if share.tls else None,
                    timeout_s=share.timeout_s,
                    retry=ONE_ATTEMPT,
                )
            )
            for tenant, token in share.tokens.items()
        }
        options = LoadOptions(
            token_ids=TokenRange(*share.token_ids),
            timeout_s=share.timeout_s,
            max_open=share.max_open,
        )
        load = Load(clients, share.adapters, options, ended.append)
        _report(load, ended)
        start_s = read_start(await asyncio.to_thread(sys.stdin.buffer.readline))
        reporting = asyncio.create_task(_report_often(load, ended))
        await load.run(share.records, start_s)
        reporting.cancel()
    _report(load, ended)


async def _report_often(load: Load, ended: list[Record]) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        _report(load, ended)


def _report(load: Load, ended: list[Record]) -> None:
    sys.stdout.buffer.write(write_progress(Progress(load.sent, ended)))
    sys.stdout.buffer.flush()
    ended.clear()


if __name__ == "__main__":
    asyncio.run(run(read_share(sys.stdin.buffer.readline())))
