"""The process that owns the device, ``python -m lorry.worker.engine_process``."""

import contextlib
import faulthandler
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from lorry.rpc.base_model import read_base_model
from lorry.worker.building import Ranks, build_engine
from lorry.worker.config import EngineConfig
from lorry.worker.engine import Engine
from lorry.worker.engine_channel import EngineArguments, EngineChannel, FrontGone
from lorry.worker.engine_faults import explain
from lorry.worker.leading_runner import tell
from lorry.worker.messages import Failed, Started, Stop
from lorry.worker.rank_link import RingLink
from lorry.worker.rank_messages import EndRank
from lorry.worker.ring import Ring
from lorry.worker.vital_sign import beating

HEARTBEAT_S = 1.0
LOAD_WAIT_S = 0.001  # between looks at loads, whose thread could not run beside a busy loop
IDLE_WAIT_S = 0.1  # bounds how late a deadline is noticed when there is nothing to compute

log = logging.getLogger("lorry.worker.engine_process")  # __name__ is __main__ here


def serve(engine: Engine, channel: EngineChannel) -> None:
    """Receive, step, send, until told to stop."""
    next_heartbeat_s = time.monotonic()
    busy = True
    while True:
        wait_s = LOAD_WAIT_S if engine.awaits_only_loads else 0.0
        commands = channel.receive(wait_s if busy else IDLE_WAIT_S)
        if any(isinstance(command, Stop) for command in commands):
            return
        engine.handle(commands)
        was_busy, busy = busy, engine.step()
        events = engine.take_events()
        if time.monotonic() >= next_heartbeat_s or (was_busy and not busy):
            events.append(engine.status())
            next_heartbeat_s = time.monotonic() + HEARTBEAT_S
        if events:
            channel.send(events)


def started(engine: Engine, config: EngineConfig) -> Started:
    limits = engine.scheduler.limits
    return Started(
        pages_total=engine.scheduler.pool.total,
        max_running=limits.max_running,
        step_tokens=limits.step_tokens,
        max_rank=config.max_rank,
        max_context_tokens=limits.max_context_tokens,
    )


def run(arguments: EngineArguments, channel: EngineChannel) -> None:
    config = arguments.config
    log.info("building the engine")
    with leading(arguments) as ranks:
        engine = build_engine(config, read_base_model(config.model), ranks)
        channel.send([started(engine, config)])
        log.info("engine ready: %d pages", engine.scheduler.pool.total)
        serve(engine, channel)


@contextlib.contextmanager
def leading(arguments: EngineArguments) -> Iterator[Ranks | None]:
    """The way to the other tensor-parallel ranks, which end after this one."""
    given = arguments.ranks
    if given is None:
        yield None
        return
    # Here, since it loads torch.distributed, which one rank does without.
    from lorry.worker.meeting import meet

    links = [RingLink(Ring.attach(*handle)) for handle in given.links]
    with beating(given.vital_fd):
        collectives = meet(given.port, arguments.config, rank=0, listening_fd=given.listening_fd)
        yield Ranks(links, collectives)
        tell(links, EndRank())


def main(run: Callable[[EngineArguments, EngineChannel], None] = run) -> None:
    """Run the engine that the command line describes; its end is explained to the front."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    faulthandler.enable()
    arguments = EngineArguments.parse()
    channel = EngineChannel.from_arguments(arguments)
    try:
        run(arguments, channel)
    except FrontGone:
        raise
    except Exception as error:
        fail(error, channel)
    if arguments.ranks is not None:
        logging.shutdown()
        os._exit(0)  # what waits for other ranks would delay an orderly end


def fail(error: Exception, channel: EngineChannel) -> NoReturn:
    """End this process; the front says why."""
    message = explain(error)
    if message is None:
        log.exception("a defect of the engine")
        message = f"{type(error).__name__}: {error}"
    channel.send([Failed(message)])
    logging.shutdown()
    os._exit(1)  # what CUDA holds cannot be torn down after a fault; that would hang or abort


if __name__ == "__main__":
    main()
