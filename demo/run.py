"""The demo: eight adapters and the base model in one batch, every token checked.

``python -m demo.run`` starts the services, pushes the adapters, sends 200 requests at once, and
then a ninth adapter that peft saves while the others are being served. Its last line is JSON.
"""

import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import track

from demo.answers import Answer, DemoFailed, Expected, compare, first_call, read_expected
from demo.newcomer import Newcomer, load_with_peft, serve_newcomer
from demo.paths import adapter_dir
from demo.scoreboard import Pushed, Scoreboard
from demo.tasks import NINTH_TASK, TASKS, right_answer
from demo.up import lorry_up
from lorry.client import Client
from lorry.client.endpoints import Endpoints
from lorry.client.probe import worker_status
from lorry.rpc.errors import LorryError
from lorry.v1.worker_service_pb2 import WorkerStatus

REQUEST_TIMEOUT_S = 120.0
STATUS_TIMEOUT_S = 10.0


def main() -> None:
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = asyncio.run(run(console))
    except (DemoFailed, LorryError) as error:
        console.print(f"the demo failed: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(summary))


async def run(console: Console) -> dict[str, Any]:
    """Do it all and return the summary; raises DemoFailed or LorryError."""
    with tempfile.TemporaryDirectory(prefix="lorry-demo-") as directory:
        console.print("starting router, adapter store and worker")
        async with (
            lorry_up(Path(directory)) as endpoints,
            Client(
                router=endpoints.router, store=endpoints.store, timeout_s=REQUEST_TIMEOUT_S
            ) as client,
        ):
            return await play(client, endpoints, console, Path(directory))


async def play(
    client: Client, endpoints: Endpoints, console: Console, directory: Path
) -> dict[str, Any]:
    expected = read_expected()
    pushed = await push_adapters(client, console)
    scoreboard = await ask_everything(client, console, expected, pushed)
    status = (await worker_status(endpoints.worker, timeout_s=STATUS_TIMEOUT_S)).status
    check_one_step_held_all(status)
    console.print("a ninth adapter comes while the others are being served: loading it with peft")
    model = await asyncio.to_thread(load_with_peft)
    newcomer = await serve_newcomer(client, model, directory / "ninth", expected)
    console.print(
        f"{NINTH_TASK}: saved in {newcomer.save_s:.3f} s, pushed in {newcomer.push_s:.3f} s, "
        f"first token {newcomer.first_token_s:.3f} s later"
    )
    return summary_of(scoreboard, status, newcomer)


async def push_adapters(client: Client, console: Console) -> dict[str, Pushed]:
    """Push all adapters and call each once, so that all are in the worker's pool."""
    pushed = {}
    for adapter in track(TASKS, "pushing adapters, calling each once", console=console):
        stored = await client.adapters.push(adapter_dir(adapter), adapter_id=adapter)
        first_call_s = await first_call(client, adapter)
        pushed[adapter] = Pushed(rank=stored.max_rank, first_call_s=first_call_s)
    return pushed


async def ask_everything(
    client: Client, console: Console, expected: list[Expected], pushed: dict[str, Pushed]
) -> Scoreboard:
    """Send all requests at once and compare every token."""
    console.print(f"sending {len(expected)} requests at once")
    scoreboard = Scoreboard(pushed, [each.adapter for each in expected])
    with Live(get_renderable=scoreboard.table, console=console, refresh_per_second=10):
        answers = await asyncio.gather(*(ask(client, each, scoreboard) for each in expected))
    console.print()
    compare(expected, answers)
    return scoreboard


async def ask(client: Client, expected: Expected, scoreboard: Scoreboard) -> Answer:
    answer = Answer([], "")
    async with client.stream(expected.request) as stream:
        scoreboard.count_first_token(expected.adapter)
        async for chunk in stream:
            answer = Answer([*answer.token_ids, *chunk.token_ids], answer.text + chunk.text)
            scoreboard.count_tokens(expected.adapter, len(chunk.token_ids))
    right = answer.text == right_answer(expected.adapter, expected.prompt)
    scoreboard.count_answer(expected.adapter, right=right)
    return answer


def check_one_step_held_all(status: WorkerStatus) -> None:
    """Raise DemoFailed unless one step of the worker held all adapters and the base model."""
    held = status.max_adapters_beside_base_in_step
    if held < len(TASKS):
        raise DemoFailed(f"no step held the base and {len(TASKS)} adapters; the most was {held}")


def summary_of(scoreboard: Scoreboard, status: WorkerStatus, newcomer: Newcomer) -> dict[str, Any]:
    scores = scoreboard.scores
    return {
        "requests": sum(score.num_answered for score in scores.values()),
        "adapters": len(TASKS),
        "exact": {name or "base": round(score.exact, 4) for name, score in scores.items()},
        "tokens_per_s": round(scoreboard.tokens_per_s, 1),
        "max_adapters_in_step": status.max_adapters_beside_base_in_step,
        "pool": {
            "pages_total": status.pages_total,
            "pages_free": status.pages_free,
            "pages_kv": status.pages_kv,
            "pages_adapter": status.pages_adapter,
            "pages_cached": status.pages_cached,
        },
        "ninth_save_to_first_token_s": round(newcomer.total_s, 3),
    }


if __name__ == "__main__":
    main()
