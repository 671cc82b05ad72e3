"""Whether a Redis can be trusted with the only copy of adapters."""

import logging
from typing import Any

from lorry.adapter_store.redis_backend.address import RedisAddress
from lorry.adapter_store.redis_backend.link import RedisLink
from lorry.rpc.errors import StoreUnavailable

MIN_VERSION = 7  # scripts that run when memory has run out

log = logging.getLogger(__name__)


def check_server(link: RedisLink, address: RedisAddress) -> None:
    """Raises ValueError for one that would lose adapters while all is well; warns of the rest."""
    with link.client() as client:
        info: dict[str, Any] = client.info()
    if int(str(info["redis_version"]).partition(".")[0]) < MIN_VERSION:
        raise ValueError(f"{address} is Redis {info['redis_version']}, not {MIN_VERSION} or newer")
    if info.get("cluster_enabled"):
        raise ValueError(f"{address} is a node of a Redis Cluster, which is not supported")
    if info.get("role") == "slave":
        raise ValueError(f"{address} is a replica; name the Redis that it follows")
    policy = info["maxmemory_policy"]
    if policy != "noeviction":
        raise ValueError(
            f"{address} has maxmemory-policy {policy}, which deletes adapters when memory runs "
            "out; set it to noeviction"
        )
    if not info["aof_enabled"]:
        log.warning("%s forgets adapters when it restarts: set appendonly to yes", address)
    elif _fsync(link) != "always":
        log.warning(
            "%s may forget the last second of changes when its machine loses power: "
            "set appendfsync to always",
            address,
        )


def _fsync(link: RedisLink) -> str | None:
    """None if the Redis does not tell."""
    try:
        with link.client() as client:
            found = client.config_get("appendfsync")
    except StoreUnavailable:  # not everybody may ask
        return None
    return str(found.get("appendfsync"))
