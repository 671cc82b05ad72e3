"""SIGKILL for a store process, or its Redis, at steps of an upload, a publish and a fetch.

Some of the points; `python -m benchmarks.store_crashes` goes through all of them.
"""

from pathlib import Path

from tests.support.redis_server import running_redis
from tests.support.store_crashes import Point, Work, crashing

POINTS = (
    Point("append", 3, done=True),
    Point("keep", 1, done=False),
    Point("commit", 1, done=True),
    Point("append", 2, done=True, victim="redis"),
    Point("mget", 2, done=False, victim="redis"),
)


async def test_no_kill_loses_what_was_acknowledged_or_brings_wrong_bytes(tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis") as redis:
        async with crashing(tmp_path, redis) as crashes:
            works = list[Work]()
            for seed, point in enumerate((*POINTS, None)):
                works = [*works[-1:], Work(seed)]
                assert await crashes.live(works, point)
