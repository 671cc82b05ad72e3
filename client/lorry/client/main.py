"""The entry point of the `lorry` command."""

from lorry.rpc.command import extra


def main() -> None:
    with extra("client"):
        from lorry.client.cli import run
    run()


if __name__ == "__main__":
    main()
