"""A deployment's secrets, made as docker-compose.yml says."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.command import REPO, child_environment

COMPOSE_FILE = REPO / "docker-compose.yml"


def make_secrets(directory: Path) -> None:
    """Run the `lorry certs make` at the head of docker-compose.yml for `directory`."""
    text = COMPOSE_FILE.read_text().replace("\\\n#", "")
    [command] = re.findall("^#   lorry (certs make .*)$", text, re.MULTILINE)
    arguments = command.replace("deploy/secrets", str(directory)).split()
    subprocess.run(
        [sys.executable, "-m", "lorry.client.main", *arguments],
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
