"""Run the router: ``python -m lorry.router --model DIR --worker HOST:PORT --store HOST:PORT``."""

import asyncio

from lorry.rpc.command import extra, run_service

with extra("router"):
    from lorry.router.config import Config
    from lorry.router.lifetime import running
    from lorry.rpc.garbage import freeze_loaded
    from lorry.rpc.server import stop_requested


async def serve(config: Config) -> None:
    async with running(config) as router:
        freeze_loaded()
        router.server.announce("router")
        await stop_requested()
        await router.drain()


def main() -> None:
    run_service(
        Config,
        lambda config: asyncio.run(serve(config)),
        name="router",
        help="Queue requests for each adapter, send them to workers and stream the answers.",
    )


if __name__ == "__main__":
    main()
