"""``python -m lorry.worker`` whose engine process fails; FAULTY_WORKER tells how."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from lorry.rpc.base_model import read_base_model
from lorry.rpc.command import run_service
from lorry.worker import ranks
from lorry.worker.config import Config
from lorry.worker.engine_channel import EngineArguments, EngineChannel
from lorry.worker.process import run

ENGINE = "--engine"
FAULT = "FAULTY_WORKER"
GOOD_STEPS = 3


def defect(arguments: EngineArguments, channel: EngineChannel) -> NoReturn:
    raise ZeroDivisionError("a defect")


def illegal_access(arguments: EngineArguments, channel: EngineChannel) -> None:
    """Serve, and let a kernel follow page numbers far beyond the pool after a few steps."""
    from lorry.worker.building import build_engine
    from lorry.worker.cuda_runner import CudaRunner
    from lorry.worker.engine_process import serve, started

    config = arguments.config
    engine = build_engine(config, read_base_model(config.model))
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    step = engine.step

    def faulty_step() -> bool:
        if engine.scheduler.steps >= GOOD_STEPS:
            runner._pages.table_RP.fill_(1 << 30)
        return step()

    engine.step = faulty_step  # type: ignore[method-assign]
    channel.send([started(engine, config)])
    serve(engine, channel)


def none(arguments: EngineArguments, channel: EngineChannel) -> None:
    """But the other tensor-parallel ranks have theirs."""
    from lorry.worker import engine_process

    engine_process.run(arguments, channel)


FAULTS: Mapping[str, Callable[[EngineArguments, EngineChannel], None]] = {
    "defect": defect,
    "illegal-access": illegal_access,
    "none": none,
}

if __name__ == "__main__":
    if ENGINE in sys.argv:
        from lorry.worker import engine_process

        sys.argv.remove(ENGINE)
        engine_process.main(FAULTS[os.environ[FAULT]])
    else:
        ranks.RANK_COMMAND = (sys.executable, "-m", "tests.support.faulty_rank")
        command = (sys.executable, "-m", "tests.support.faulty_worker", ENGINE)
        run_service(
            Config,
            lambda config: sys.exit(run(config, engine_command=command)),
            name="worker",
            help="A worker whose engine fails.",
        )
