"""Whether a Redis counts right who refers to each chunk and content: none may go too early."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping

from lorry.adapter_store.redis_backend.link import RedisLink

KEYS_PER_READ = 500
PASSES = 3  # while stores go on, what a single pass finds may be a change in between


def problems(link: RedisLink) -> list[str]:
    """What does not fit together, each as a line; empty if all is well."""
    found = set(_problems(link))
    for _ in range(PASSES - 1):
        if found:
            found &= set(_problems(link))
    return sorted(found)


def _problems(link: RedisLink) -> Iterator[str]:
    contents: Counter[str] = Counter()
    for text in _values(link, "lorry:adapters").values():
        contents.update(version["digest"] for version in json.loads(text)["versions"])
    owners = [key for key in _keys(link, "lorry:content:*") if not key.endswith(":chunks")]
    there = {key.rpartition(":")[2] for key in owners}
    for key in _keys(link, "lorry:upload:*"):
        if not key.endswith((":chunks", ":tail")):
            owners.append(key)
            contents.update(_content_of(link, key))
    chunks = _chunks(link, owners)
    yield from _differences("content", contents, _counts(link, "lorry:contents"), there)
    stored = {key.rpartition(":")[2] for key in _keys(link, "lorry:chunk:*")}
    yield from _differences("chunk", chunks, _counts(link, "lorry:chunks"), stored)


def _differences(
    what: str, owners: Mapping[str, int], counted: Mapping[str, int], there: set[str]
) -> Iterator[str]:
    for digest in sorted(owners.keys() | counted.keys() | there):
        owned, count = owners.get(digest, 0), counted.get(digest, 0)
        if owned != count:
            yield f"{what} {digest} has {owned} owners, but {count} are counted"
        if digest not in there:
            yield f"{what} {digest} is missing"
        elif digest not in counted:
            yield f"{what} {digest} belongs to nothing"


def _chunks(link: RedisLink, owners: list[str]) -> Counter[str]:
    """How many of the owners have each chunk."""
    chunks: Counter[str] = Counter()
    for owner in owners:
        with link.client() as client:
            chunks.update(each.decode() for each in client.lrange(f"{owner}:chunks", 0, -1))
    return chunks


def _content_of(link: RedisLink, upload: str) -> list[str]:
    with link.client() as client:
        content = client.hget(upload, "content")
    return [content.decode()] if content else []


def _keys(link: RedisLink, pattern: str) -> list[str]:
    with link.client() as client:
        return [key.decode() for key in client.scan_iter(pattern, count=KEYS_PER_READ)]


def _values(link: RedisLink, key: str) -> dict[str, bytes]:
    with link.client() as client:
        found = client.hscan_iter(key, count=KEYS_PER_READ)
        return {name.decode(): value for name, value in found}


def _counts(link: RedisLink, key: str) -> dict[str, int]:
    return {name: int(value) for name, value in _values(link, key).items()}
