"""The checks of configs before uploads begin: tenants do not wait for each other's."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from weakref import WeakValueDictionary

from lorry.adapter_store.builders import Builders
from lorry.adapter_store.limits import Limits
from lorry.adapter_store.lora import LoraSpec
from lorry.rpc.errors import StoreUnavailable

WAIT_S = 30.0
RETRY_AFTER_S = 1.0


class ConfigChecks:
    """Gives each tenant one process at a time, however many of its configs take long."""

    def __init__(self, builders: Builders, limits: Limits) -> None:
        self._builders, self._limits = builders, limits
        self._num_under_way: Counter[str] = Counter()  # by tenant
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def num_under_way(self, tenant: str) -> int:
        """Checks that run or wait."""
        return self._num_under_way[tenant]

    async def check(self, tenant: str, config_json: str) -> LoraSpec:
        """Resolve an adapter_config.json.

        Raises AdapterInvalid, TenantLimit if as many wait as may be uploaded, or StoreUnavailable
        if its turn does not come.
        """
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        with self._counted(tenant):
            try:
                async with asyncio.timeout(WAIT_S), turn:
                    return await self._builders.check_config(config_json)
            except TimeoutError:
                raise StoreUnavailable(
                    f"other configs kept this one waiting for {WAIT_S:g} s",
                    retry_after_s=RETRY_AFTER_S,
                ) from None

    @contextlib.contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        self._limits.check_uploads(tenant, self._num_under_way[tenant] + 1)
        self._num_under_way[tenant] += 1
        try:
            yield
        finally:
            self._num_under_way[tenant] -= 1
            if not self._num_under_way[tenant]:
                del self._num_under_way[tenant]
