"""One tenant offers far more uploads than it may have under way, over many connections."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path

from lorry.adapter_store.limits import Limits, TenantLimits
from lorry.rpc.errors import TenantLimit
from lorry.rpc.identity import Caller, Role
from tests.support.adapter_store import Client, running_store
from tests.support.adapters import lora_config, lora_files, lora_tensors

CONFIG = lora_config(r=4)
WEIGHTS = lora_files(CONFIG, lora_tensors(CONFIG))[1]
TOKENS = {
    sha256(tenant.encode()).digest(): Caller(tenant, frozenset({Role.MANAGE}))
    for tenant in ("flood", "calm")
}
CONNECTIONS, UPLOADS_EACH, LIMIT = 20, 10, 8


async def offer(client: Client, connection: int) -> Counter[str]:
    """Begin uploads one after another and never send a byte; how each was answered."""
    answers: Counter[str] = Counter()
    for number in range(UPLOADS_EACH):
        try:
            await client.begin(f"a-{connection}-{number}", CONFIG, WEIGHTS)
            answers["begun"] += 1
        except TenantLimit as error:
            answers[error.metadata["what"]] += 1
    return answers


async def test_a_flood_of_uploads_stops_at_its_tenants_limit_and_disturbs_nobody(
    tmp_path: Path,
) -> None:
    limits = Limits(tenant=TenantLimits(uploads=LIMIT))
    async with (
        running_store(tmp_path, tokens=TOKENS, limits=limits) as running,
        AsyncExitStack() as stack,
        running.client_with("calm") as calm,
    ):
        clients = [
            await stack.enter_async_context(running.client_with("flood"))
            for _ in range(CONNECTIONS)
        ]
        floods = [asyncio.create_task(offer(c, number)) for number, c in enumerate(clients)]
        adapter = await calm.push("mine", CONFIG, WEIGHTS)
        assert adapter.name == "tenants/calm/adapters/mine"
        answers = sum([await flood for flood in floods], Counter[str]())
        assert answers == {"begun": LIMIT, "uploads": CONNECTIONS * UPLOADS_EACH - LIMIT}
        assert running.store.uploads.num_open == LIMIT
