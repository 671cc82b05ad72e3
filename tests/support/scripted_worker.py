"""``python -m lorry.worker`` with the scripted engine."""

import sys

from lorry.rpc.command import run_service
from lorry.worker.config import Config
from lorry.worker.process import run
from tests.support import scripted_engine

if __name__ == "__main__":
    run_service(
        Config,
        lambda config: sys.exit(run(config, engine_command=scripted_engine.COMMAND)),
        name="worker",
        help="A worker that computes nothing.",
    )
