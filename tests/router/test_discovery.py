import logging
import socket

import pytest

from lorry.router.discovery import Discovery, Target, resolve_host
from tests.support.names import Names

WORKERS = Target("workers.test", 50053, by_dns=True)


@pytest.fixture
def names() -> Names:
    names = Names()
    names.hosts["workers.test"] = ["10.0.0.1", "10.0.0.2"]
    return names


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("w1:50053", Target("w1", 50053, by_dns=False)),
        ("[::1]:50053", Target("[::1]", 50053, by_dns=False)),
        ("dns:///workers.ns.svc:50053", Target("workers.ns.svc", 50053, by_dns=True)),
    ],
)
def test_a_worker_is_an_address_or_a_name_of_many(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    "text", ["", "w1", "w1:http", ":1", "dns://8.8.8.8/w:1", "dns:///w", "w:²", "x" * 64 + ":1"]
)
def test_what_is_neither_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="worker must be HOST:PORT") as refusal:
        Target.parse(text)
    assert repr(text) in str(refusal.value)


async def test_addresses_are_the_given_ones_and_those_of_the_names(names: Names) -> None:
    discovery = Discovery([Target("w1", 1, by_dns=False), WORKERS], names.resolve)
    assert await discovery.addresses() == {"w1:1", "10.0.0.1:50053", "10.0.0.2:50053"}
    names.hosts["workers.test"] = ["10.0.0.2", "10.0.0.3"]
    assert await discovery.addresses() == {"w1:1", "10.0.0.2:50053", "10.0.0.3:50053"}


async def test_a_failed_look_up_changes_nothing(names: Names) -> None:
    discovery = Discovery([WORKERS], names.resolve)
    before = await discovery.addresses()
    for failure in (socket.EAI_AGAIN, socket.EAI_FAIL):
        names.failure = failure
        assert await discovery.addresses() == before


async def test_a_name_without_addresses_has_no_workers(names: Names) -> None:
    discovery = Discovery([WORKERS], names.resolve)
    await discovery.addresses()
    names.hosts.clear()
    assert await discovery.addresses() == set()


async def test_a_failure_is_logged_once(names: Names, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    discovery = Discovery([WORKERS], names.resolve)
    names.failure = socket.EAI_AGAIN
    for _ in range(3):
        await discovery.addresses()
    assert len(caplog.records) == 1
    assert "workers.test" in caplog.text
    names.failure = None
    await discovery.addresses()
    names.failure = socket.EAI_AGAIN
    await discovery.addresses()
    assert len(caplog.records) == 2


async def test_the_systems_resolver_finds_this_machine() -> None:
    found = await resolve_host("localhost", 50053)
    assert found in ({"127.0.0.1:50053"}, {"[::1]:50053"}), "of one family"


async def test_the_systems_resolver_tells_that_a_name_does_not_exist() -> None:
    with pytest.raises(socket.gaierror):
        await resolve_host("nothing.invalid", 50053)
