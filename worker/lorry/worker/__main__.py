"""The worker: ``python -m lorry.worker --model DIR``."""

import sys

from lorry.rpc.command import extra, run_service

with extra("worker"):
    from lorry.worker.config import Config
    from lorry.worker.process import run

HELP = """Run a base model for batches of requests with many adapters.

Routers attach over gRPC; the engine, which owns the device, is a process of its own.
"""


def main() -> None:
    run_service(Config, lambda config: sys.exit(run(config)), name="worker", help=HELP)


if __name__ == "__main__":
    main()
