"""One tenant offers more uploads than it may have, or configs that take longer than all others."""

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from lorry.adapter_store.builders import Builders
from lorry.adapter_store.config_checks import ConfigChecks
from lorry.adapter_store.limits import Limits, TenantLimits
from lorry.rpc.errors import StoreUnavailable, TenantLimit
from lorry.rpc.identity import Caller, Role
from tests.support.adapter_store import Client, running_store
from tests.support.adapters import TINY, lora_config, lora_files, lora_tensors
from tests.support.waiting import until

CONFIG = lora_config(r=4)
# Backtracks for longer than anyone waits, on names like model.layers.0.self_attn.q_proj.
ENDLESS = lora_config(targets=r"((((m|mo|o|d|e|l|\.|\w)+)+)+)+!")
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


async def test_configs_that_take_long_keep_no_other_tenant_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.adapter_store.builders.CONFIG_LIMIT_S", 600)
    monkeypatch.setattr("lorry.adapter_store.config_checks.WAIT_S", 600.0)
    limits = Limits(tenant=TenantLimits(uploads=3))
    async with (
        running_store(tmp_path, tokens=TOKENS, limits=limits) as running,
        running.client_with("flood") as flood,
        running.client_with("calm") as calm,
    ):
        endless = [asyncio.create_task(flood.begin(f"e-{n}", ENDLESS, WEIGHTS)) for n in range(3)]
        await until(lambda: running.store.config_checks.num_under_way("flood") == 3)
        with pytest.raises(TenantLimit, match="uploads: the tenant may have 3, this would be 4"):
            await flood.begin("one-more", CONFIG, WEIGHTS)
        adapter = await calm.push("mine", CONFIG, WEIGHTS)
        assert adapter.name == "tenants/calm/adapters/mine"
        for call in endless:
            call.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        await until(lambda: running.store.config_checks.num_under_way("flood") == 0)
        await flood.push("mine", CONFIG, WEIGHTS)


async def test_a_config_whose_turn_does_not_come_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builders = Builders(TINY, processes=1)
    checks = ConfigChecks(builders, Limits())
    await checks.check("flood", json.dumps(CONFIG))
    monkeypatch.setattr("lorry.adapter_store.config_checks.WAIT_S", 0.1)
    with pytest.raises(StoreUnavailable, match=r"waiting for 0.1 s"):
        await checks.check("flood", json.dumps(ENDLESS))
    assert checks.num_under_way("flood") == 0
    await builders.close()


async def test_a_tenant_at_its_limit_has_no_config_checked(tmp_path: Path) -> None:
    limits = Limits(tenant=TenantLimits(adapters=0))
    async with running_store(tmp_path, limits=limits) as running:
        with pytest.raises(TenantLimit, match="adapters"):
            await running.client.begin("mine", ENDLESS, WEIGHTS)


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
