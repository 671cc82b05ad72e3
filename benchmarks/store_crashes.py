"""Does any kill lose what was acknowledged, or bring a wrong byte? SIGKILL at every step.

    python -m benchmarks.store_crashes

A store process keeps an adapter's versions in a real Redis. One life of it shows the steps of an
upload, a publish and a fetch: whatever it asks of Redis. Then it is killed right before each of
them, and right after each before it hears of it; then Redis is, at the same points. The next life,
or the same store with the Redis that has read its log, must know all that the client was told, go
on from there, and hand out exactly the uploaded weights; and nothing may be left without an owner.
It stops at the first point where that is not so. A point takes seconds.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_file import host_name, spread, write_result
from tests.support.redis_server import RedisServer, running_redis
from tests.support.store_crashes import Crashes, Point, Work, crashing, points_of

VICTIMS = ("store", "redis")


async def run(directory: Path, redis: RedisServer, victims: list[str]) -> dict[str, Any]:
    async with crashing(directory, redis) as crashes:
        works = numbered_works()
        first = next(works)
        steps = await crashes.live([first], None)
        points = [point for victim in victims for point in points_of(steps, victim=victim)]
        seconds = await kill_at(crashes, points, first, works)
    return {
        "steps": len(steps),
        "points": {victim: sum(point.victim == victim for point in points) for victim in victims},
        "lost": 0,
        "wrong": 0,
        "seconds_of_a_point": spread(seconds, digits=1),
    }


async def kill_at(
    crashes: Crashes, points: list[Point], last: Work, works: Iterator[Work]
) -> list[float]:
    """Seconds of each point. Raises AssertionError where something was lost or wrong."""
    seconds = []
    for number, point in enumerate([*points, None]):
        started_s = time.monotonic()
        left, last = last, next(works)
        try:
            await crashes.live([left, last], point)
        except AssertionError as error:
            raise AssertionError(f"{point or 'the last life'}: {error}") from error
        seconds.append(time.monotonic() - started_s)
        print(f"{number + 1:3d}/{len(points)}  {point}  {seconds[-1]:.1f} s", flush=True)
    return seconds


def numbered_works() -> Iterator[Work]:
    seed = 0
    while True:
        yield Work(seed)
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running_redis(Path(name) / "redis") as redis:
        metrics = asyncio.run(run(Path(name), redis, arguments.victims))
        version = redis.client.info()["redis_version"]
    write_result(
        "store-crashes",
        benchmark="store_crashes",
        device=host_name(),
        config={"redis": version, "victims": arguments.victims},
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
