"""``python -m benchmarks.soak``: exits with 1 if anything was wrong or is left."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.results_file import host_name, write_result
from benchmarks.soak.run import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800, help="how long (default 1800)")
    parser.add_argument("--seed", type=int, help="of all choices (default: a new one)")
    parser.add_argument("--directory", type=Path, help="for logs and adapters, to be kept")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="lorry-soak-") as temporary:
        directory: Path = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(soak(directory, seconds=arguments.seconds, seed=seed))
    print("\n".join(report.table()))
    write_result(
        "soak",
        benchmark="soak",
        device=host_name(),
        config={"seconds": arguments.seconds, "seed": seed},
        metrics=report.to_json(),
    )
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
