"""The loop users want: an adapter saved by peft, pushed and called while others are served."""

import asyncio
import importlib
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.answers import Answer, Expected, compare, first_call
from demo.tasks import NINTH_TASK
from lorry.client import Client

CROWD_SIZE = 64  # requests in flight, of all adapters and the base model


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """Seconds that each part took."""

    save_s: float
    push_s: float
    first_token_s: float

    @property
    def total_s(self) -> float:
        return self.save_s + self.push_s + self.first_token_s


async def serve_newcomer(
    client: Client, model: Any, directory: Path, expected: list[Expected]
) -> Newcomer:
    """Save, push and call the ninth adapter while the requests of `expected` are being served."""
    async with crowd(client, expected[:CROWD_SIZE]):
        began_s = time.monotonic()
        await asyncio.to_thread(save_with_peft, model, directory)
        saved_s = time.monotonic()
        await client.adapters.push(directory, adapter_id=NINTH_TASK)
        pushed_s = time.monotonic()
        first_token_s = await first_call(client, NINTH_TASK)
    return Newcomer(
        save_s=saved_s - began_s, push_s=pushed_s - saved_s, first_token_s=first_token_s
    )


@asynccontextmanager
async def crowd(client: Client, expected: list[Expected]) -> AsyncIterator[None]:
    """The same requests over and over while the block runs; raises DemoFailed for a difference."""
    asking = asyncio.create_task(_keep_asking(client, expected))
    try:
        yield
    finally:
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


async def _keep_asking(client: Client, expected: list[Expected]) -> None:
    while True:
        answers = await asyncio.gather(*(client.generate(each.request) for each in expected))
        compare(expected, [Answer(list(each.token_ids), each.text) for each in answers])


def load_with_peft() -> Any:
    """The ninth adapter's model, as after its training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' of its own doings
        from demo.ninth import load_ninth_adapter

        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        return load_ninth_adapter()


def save_with_peft(model: Any, directory: Path) -> None:
    from demo.ninth import save_adapter

    save_adapter(model, str(directory))
