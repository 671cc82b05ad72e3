import hashlib
import json
import logging
import os
from pathlib import Path

import grpc
import grpc.aio
import pytest

from lorry.rpc.callers import read_tokens
from lorry.rpc.channel import Credentials, open_channel, read_token
from lorry.rpc.errors import Unauthenticated
from lorry.rpc.identity import Authenticator
from lorry.rpc.reloading import Reloading
from lorry.rpc.service_config import ServiceConfig
from lorry.rpc.status import from_rpc
from tests.support.services import METHODS, serving_all

GENERATE = METHODS["/lorry.v1.InferenceService/Generate"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def number(file: Path, *, look_s: float = 0.0) -> Reloading[int]:
    return Reloading([file], lambda: int(file.read_text()), look_s=look_s)


def replace(file: Path, text: str) -> None:
    """As deployments do, whole: then also a file of the same size and time is another one."""
    temporary = file.with_suffix(".new")
    temporary.write_text(text)
    stat = file.stat()
    os.utime(temporary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    temporary.replace(file)


def test_a_file_is_read_again_only_when_it_changes(file: Path) -> None:
    value = number(file)
    assert value.get() is value.get()
    replace(file, "2")
    assert value.get() == 2


def test_what_cannot_be_read_leaves_the_last_value(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = number(file)
    replace(file, "x")
    assert [value.get(), value.get()] == [1, 1]
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    file.unlink()
    assert value.get() == 1
    file.write_text("3")
    assert value.get() == 3


def test_a_link_that_is_turned_to_another_directory_is_a_change(tmp_path: Path) -> None:
    """So Kubernetes updates mounted secrets."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "number").write_text(str(len(name)))
    (tmp_path / "b" / "number").write_text("7")
    link = tmp_path / "data"
    link.symlink_to("a")
    value = number(link / "number")
    (tmp_path / "next").symlink_to("b")
    (tmp_path / "next").replace(link)
    assert value.get() == 7


def test_files_are_not_looked_at_all_the_time(file: Path) -> None:
    value = number(file, look_s=3600.0)
    replace(file, "2")
    assert value.get() == 1


def test_the_first_reading_must_succeed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        number(tmp_path / "nowhere")


def write_tokens(path: Path, *tokens: str) -> None:
    entries = [
        {"sha256": hashlib.sha256(t.encode()).hexdigest(), "tenant": "acme", "role": "infer"}
        for t in tokens
    ]
    path.write_text(json.dumps({"tokens": entries}))


async def test_tokens_of_both_sides_change_while_they_run(tmp_path: Path) -> None:
    """A client's file holds the next token before the server's forgets the last one."""
    tokens, token = tmp_path / "tokens.json", tmp_path / "token"
    write_tokens(tokens, "first")
    token.write_text("first\n")
    known = Reloading([tokens], lambda: read_tokens(tokens), look_s=0.0)
    shown = Reloading([token], lambda: read_token(token), look_s=0.0)
    async with serving_all(Authenticator(known.get)) as (_, channel):
        await GENERATE.call(channel, shown.get())
        write_tokens(tokens, "first", "second")
        token.write_text("second")
        await GENERATE.call(channel, shown.get())
        write_tokens(tokens, "second")
        await GENERATE.call(channel, shown.get())
        with pytest.raises(grpc.RpcError) as error:
            await GENERATE.call(channel, "first")
        assert isinstance(from_rpc(error.value), Unauthenticated)


@pytest.mark.parametrize("content", ["", "  \n", "a\nb", "tök"])
async def test_a_token_file_without_a_token_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"token file .* must hold one line"):
        open_channel("127.0.0.1:1", Credentials(token_file=path))
    path.unlink()
    with pytest.raises(ValueError, match=r"token file .* cannot be read"):
        open_channel("127.0.0.1:1", Credentials(token_file=path))


def config(**options: object) -> ServiceConfig:
    return ServiceConfig(model=Path("m"), **options)  # type: ignore[arg-type]


def test_other_machines_are_served_over_tls_where_a_file_says_who_may_call(tmp_path: Path) -> None:
    beyond = {"address": "0.0.0.0:50051", "metrics_address": "0.0.0.0:9000"}
    with pytest.raises(ValueError, match="--tls, or --insecure"):
        config(**beyond, tokens=tmp_path)
    with pytest.raises(ValueError, match="tokens or tls_callers must say who may call"):
        config(**beyond, tls=tmp_path)
    for who in ("tokens", "tls_callers"):
        config(**beyond, tls=tmp_path, **{who: tmp_path})
    config(**beyond, insecure=True)


def test_certificates_of_callers_need_tls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tls_callers needs tls"):
        config(address="127.0.0.1:1", tls_callers=tmp_path)


def test_probes_may_come_from_other_machines() -> None:
    config(address="127.0.0.1:1", health_address="0.0.0.0:52051")
    with pytest.raises(ValueError, match="health_address must be HOST:PORT"):
        config(address="127.0.0.1:1", health_address="52051")
