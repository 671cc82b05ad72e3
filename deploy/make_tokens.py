"""Make the bearer tokens of a deployment: python deploy/make_tokens.py [DIRECTORY]

Writes tokens.json, which holds digests only and is for every service's --tokens, and a file with
the token itself for each role: router and worker show theirs to other services, admin and infer
are for clients. Existing tokens are kept, so that it can be run again.
"""

import hashlib
import json
import secrets
import sys
from pathlib import Path

TENANT = "default"
ROLES = ["router", "worker", "admin", "infer"]
DEFAULT_DIRECTORY = Path(__file__).parent / "secrets"


def main(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    entries = [
        {"sha256": digest_of(make_token(directory, role)), "tenant": TENANT, "role": role}
        for role in ROLES
    ]
    write(directory / "tokens.json", json.dumps({"tokens": entries}, indent=2) + "\n")


def make_token(directory: Path, role: str) -> str:
    path = directory / f"{role}.token"
    if not path.exists():
        write(path, secrets.token_urlsafe(32) + "\n")
    return path.read_text().strip()


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def write(path: Path, text: str) -> None:
    """Readable for the containers' user, which gets the file alone; the directory is closed."""
    path.touch()
    path.chmod(0o644)
    path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_DIRECTORY)
