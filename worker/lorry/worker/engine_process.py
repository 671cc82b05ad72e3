"""The process that owns the device, ``python -m lorry.worker.engine_process``."""

import logging
import time

from lorry.rpc.base_model import read_base_model
from lorry.worker.building import build_engine
from lorry.worker.config import EngineConfig
from lorry.worker.engine import Engine
from lorry.worker.engine_channel import EngineArguments, EngineChannel
from lorry.worker.messages import Started, Stop

HEARTBEAT_S = 1.0
IDLE_WAIT_S = 0.1  # bounds how late a deadline is noticed when there is nothing to compute

log = logging.getLogger("lorry.worker.engine_process")  # __name__ is __main__ here


def serve(engine: Engine, channel: EngineChannel) -> None:
    """Receive, step, send, until told to stop."""
    next_heartbeat_s = time.monotonic()
    busy = True
    while True:
        commands = channel.receive(0.0 if busy else IDLE_WAIT_S)
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
        max_rank=config.max_rank,
        max_context_tokens=limits.max_context_tokens,
    )


def main() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    arguments = EngineArguments.parse()
    channel = EngineChannel.from_arguments(arguments)
    base_model = read_base_model(arguments.config.model)
    engine = build_engine(arguments.config, base_model)
    channel.send([started(engine, arguments.config)])
    log.info("engine ready: %d pages", engine.scheduler.pool.total)
    serve(engine, channel)


if __name__ == "__main__":
    main()
