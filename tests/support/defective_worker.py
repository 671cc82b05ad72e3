"""``python -m lorry.worker`` whose engine process has a defect."""

import sys
from typing import NoReturn

from lorry.rpc.command import run_service
from lorry.worker import engine_process
from lorry.worker.config import Config, EngineConfig
from lorry.worker.engine_channel import EngineChannel
from lorry.worker.process import run

ENGINE = "--engine"


def fail(config: EngineConfig, channel: EngineChannel) -> NoReturn:
    raise ZeroDivisionError("a defect")


if __name__ == "__main__":
    if ENGINE in sys.argv:
        sys.argv.remove(ENGINE)
        engine_process.main(fail)
    else:
        command = (sys.executable, "-m", "tests.support.defective_worker", ENGINE)
        run_service(
            Config,
            lambda config: sys.exit(run(config, engine_command=command)),
            name="worker",
            help="A worker whose engine fails.",
        )
