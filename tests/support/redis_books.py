"""Whether what a Redis says of who refers to what is so."""

import json
from collections import Counter
from typing import Any


def check_books(client: Any) -> None:
    """Assert that each chunk and content has exactly the owners that are counted, and is there."""
    contents: Counter[str] = Counter()
    for text in client.hvals("lorry:adapters"):
        contents.update(version["digest"] for version in json.loads(text)["versions"])
    owners = [key for key in _keys(client, "lorry:content:*") if not key.endswith(":chunks")]
    for key in _keys(client, "lorry:upload:*"):
        if not key.endswith((":chunks", ":tail")):
            owners.append(key)
            content = client.hget(key, "content")
            contents.update([content.decode()] if content else [])
    chunks: Counter[str] = Counter()
    for owner in owners:
        chunks.update(each.decode() for each in client.lrange(f"{owner}:chunks", 0, -1))
    assert _counts(client, "lorry:chunks") == chunks
    assert {key.rpartition(":")[2] for key in _keys(client, "lorry:chunk:*")} == chunks.keys()
    kept = _counts(client, "lorry:contents")
    assert Counter({digest: count for digest, count in kept.items() if count}) == contents
    there = {key.rpartition(":")[2] for key in owners if key.startswith("lorry:content:")}
    assert there == kept.keys()
    idle = {each.decode() for each in client.zrange("lorry:unreferenced", 0, -1)}
    assert idle == {digest for digest, count in kept.items() if not count}


def _keys(client: Any, pattern: str) -> list[str]:
    return [key.decode() for key in client.keys(pattern)]


def _counts(client: Any, key: str) -> Counter[str]:
    return Counter({name.decode(): int(count) for name, count in client.hgetall(key).items()})
