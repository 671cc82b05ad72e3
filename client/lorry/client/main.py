"""The entry point of the `lorry` command."""

import os

from lorry.rpc.command import extra


def main() -> None:
    # Read when gRPC is imported. What matters of its notes comes as an error, too.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with extra("client"):
        from lorry.client.cli import run
    run()


if __name__ == "__main__":
    main()
