"""The `lorry` command line."""

import asyncio
import os
import sys

from cyclopts import App

from lorry.client.commands import adapters, certs, tokens
from lorry.client.commands.bench import bench
from lorry.client.commands.generate import generate
from lorry.client.commands.status import status
from lorry.client.commands.up import up
from lorry.client.console import complain, explain
from lorry.client.local.process import ServiceFailed
from lorry.rpc.errors import LorryError

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

app = App(
    name="lorry",
    help="Serve thousands of LoRA adapters on one base model.",
    help_epilogue="`lorry up --model DIR` starts everything on this machine.",
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.command(up)
app.command(generate)
app.command(adapters.app)
app.command(tokens.app)
app.command(certs.app)
app.command(status)
app.command(bench)


def run() -> None:
    """Run the command of sys.argv; a failure is one line on stderr and a non-zero exit."""
    try:
        app()
    except (LorryError, ServiceFailed, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            _silence_stdout()
            sys.exit(1)
        complain(explain(error))
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(INTERRUPTED)


def _silence_stdout() -> None:
    """The reader went away; the interpreter would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
