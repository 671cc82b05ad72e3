import asyncio
import contextlib
import logging

import pytest
from prometheus_client import CollectorRegistry

from lorry.rpc.histogram import Histogram
from lorry.rpc.metrics import Metric, TableCollector, counter, gauge, histogram, registry_of
from lorry.rpc.metrics_server import MAX_CONNECTIONS, MetricsPort, serving_metrics
from lorry.rpc.service_config import ServiceConfig
from tests.support.scrape import scrape
from tests.support.waiting import until


class State:
    def __init__(self):
        self.num_cars = 2
        self.by_color = {("red",): 3, ("blue",): 4}
        self.trip_s = Histogram((1.0, 2.5))


TABLE: list[Metric[State]] = [
    gauge("cars", "Cars", lambda s: s.num_cars),
    counter("wheels_total", "Wheels", lambda s: s.by_color, ("color",)),
    histogram("trip_seconds", "Trips", lambda s: s.trip_s),
]


@contextlib.asynccontextmanager
async def served(state):
    """The port on which a state's metrics are."""
    registry = CollectorRegistry()
    registry.register(TableCollector(TABLE, state))
    async with serving_metrics("127.0.0.1:0", registry) as port:
        yield port


async def raw(port, request: bytes) -> bytes:
    """The answer; nothing if the connection is dropped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_scrape_reads_the_state_of_that_moment():
    state = State()
    async with served(state) as port:
        url = f"http://127.0.0.1:{port}/metrics"
        before = await scrape(url)
        state.num_cars, state.by_color["red",] = 5, 7
        after = await scrape(url)
    assert (before.value("cars"), after.value("cars")) == (2, 5)
    assert before.value("wheels_total") == 7
    assert after.value("wheels_total", color="red") == 7
    assert after.names == {"cars", "wheels_total", "trip_seconds"}


async def test_a_histogram_counts_values_up_to_and_with_each_bound():
    state = State()
    for seconds in (0.5, 1.0, 1.1, 2.5, 99.0):
        state.trip_s.observe(seconds)
    async with served(state) as port:
        found = await scrape(f"http://127.0.0.1:{port}/metrics")
    buckets = {bound: found.value("trip_seconds_bucket", le=bound) for bound in ("1.0", "2.5")}
    assert buckets == {"1.0": 2, "2.5": 4}
    assert found.value("trip_seconds_bucket", le="+Inf") == found.value("trip_seconds_count") == 5
    assert found.value("trip_seconds_sum") == pytest.approx(104.1)


async def test_the_process_is_measured_beside_the_table():
    async with serving_metrics("127.0.0.1:0", registry_of()) as port:
        found = await scrape(f"http://127.0.0.1:{port}/metrics")
    assert found.value("process_resident_memory_bytes") > 1e6
    assert found.value("process_open_fds") > 3


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", b"text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0", b"application/openmetrics-text"),
    ],
)
async def test_the_format_is_what_the_scraper_accepts(accept, content_type):
    async with served(State()) as port:
        answer = await raw(port, f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: " + content_type in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert body.endswith(b"# EOF\n") is bool(accept)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics?name=x HTTP/1.1", b"200"),
        (b"GET / HTTP/1.1", b"404"),
        (b"GET /metrics/ HTTP/1.1", b"404"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"\xff\x00 nonsense", b"405"),
    ],
)
async def test_only_metrics_can_be_had(request_line, status):
    async with served(State()) as port:
        assert (await raw(port, request_line + b"\r\n\r\n")).split()[1] == status


async def test_a_request_without_end_is_dropped_and_the_next_one_is_answered():
    async with served(State()) as port:
        assert await raw(port, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000) == b""
        assert (await scrape(f"http://127.0.0.1:{port}/metrics")).value("cars") == 2


async def test_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr("lorry.rpc.metrics_server.REQUEST_S", 0.05)
    async with served(State()) as port:
        assert await raw(port, b"GET /metrics HTTP/1.1\r\n") == b""


async def test_connections_are_bounded():
    port = MetricsPort(CollectorRegistry())
    server = await asyncio.start_server(port.serve, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    async with server, contextlib.AsyncExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            _, writer = await asyncio.open_connection("127.0.0.1", number)
            stack.callback(writer.close)
        await until(lambda: port.num_connections == MAX_CONNECTIONS)
        assert await raw(number, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        await stack.aclose()
        await until(lambda: not port.num_connections)
        assert b"200" in await raw(number, b"GET /metrics HTTP/1.1\r\n\r\n")


async def test_a_metric_that_cannot_be_read_fails_its_scrape_only(caplog):
    state = State()
    async with served(state) as port:
        del state.num_cars
        assert (await raw(port, b"GET /metrics HTTP/1.1\r\n\r\n")).split()[1] == b"500"
        assert "the metrics cannot be read" in caplog.text
        state.num_cars = 1
        assert (await scrape(f"http://127.0.0.1:{port}/metrics")).value("cars") == 1


async def test_leaving_closes_the_port_even_beside_an_open_connection():
    async with served(State()) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_an_empty_address_serves_nothing_and_a_taken_one_is_named():
    async with serving_metrics("", CollectorRegistry()) as port:
        assert port is None
    async with served(State()) as port:
        with pytest.raises(ValueError, match=f"metrics_address '127.0.0.1:{port}'"):
            async with serving_metrics(f"127.0.0.1:{port}", CollectorRegistry()):
                pass


async def test_the_port_is_logged(caplog):
    caplog.set_level(logging.INFO)
    async with served(State()) as port:
        assert f"metrics at http://127.0.0.1:{port}/metrics" in caplog.text


@pytest.mark.parametrize(
    ("address", "given", "scraped"),
    [
        ("127.0.0.1:50051", None, "127.0.0.1:51051"),
        ("127.0.0.1:0", None, "127.0.0.1:0"),
        ("127.0.0.1:50051", "", ""),
        ("127.0.0.1:50051", "[::1]:9000", "[::1]:9000"),
    ],
)
def test_metrics_are_by_default_on_loopback_beside_the_service(tmp_path, address, given, scraped):
    config = ServiceConfig(model=tmp_path, address=address, metrics_address=given)
    assert config.scraped_address == scraped


def test_metrics_on_other_machines_need_insecure(tmp_path):
    def config(metrics_address, *, insecure=False):
        return ServiceConfig(
            model=tmp_path,
            address="127.0.0.1:0",
            metrics_address=metrics_address,
            insecure=insecure,
        )

    with pytest.raises(ValueError, match=r"metrics_address '0\.0\.0\.0:9000' is reachable"):
        config("0.0.0.0:9000")
    assert config("0.0.0.0:9000", insecure=True).scraped_address == "0.0.0.0:9000"
    with pytest.raises(ValueError, match="metrics_address must be HOST:PORT, got '9000'"):
        config("9000")


def test_a_service_elsewhere_still_has_its_metrics_on_loopback(tmp_path):
    config = ServiceConfig(model=tmp_path, address="0.0.0.0:50051", insecure=True)
    assert config.scraped_address == "127.0.0.1:51051"
